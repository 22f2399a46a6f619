"""What every kernel of a step shares: one int64 block whose address is an operand of each kernel.

Slices are rows of one sequence: `slices` int64 [slice_count, 4] = first row, rows, position of the first row, address
of the sequence's page addresses (int64). `rope` float32 [rows, 2, D/2] = cosines, sines of each row's position.
"""
from __future__ import annotations

# Rows of decoded tokens come first (`few_rows`), rows of prompts follow (`many_rows` of them, from row `few_rows`):
# on processors with matrix tiles the two are computed by different kernels, so that a row's result does not depend on
# what else is in the step. Elsewhere all rows count as few.
NAMES = ("rows", "slice_count", "slices", "rope", "logit_rows", "logit_index", "task_count", "tasks", "merge_count",
         "merges", "partials", "token_ids", "few_rows", "many_rows", "zero", "hidden_rows",
         "hidden_index", "prefill_count", "prefill_tasks")
(ROWS, SLICE_COUNT, SLICES, ROPE, LOGIT_ROWS, LOGIT_INDEX, TASK_COUNT, TASKS, MERGE_COUNT, MERGES, PARTIALS,
 TOKEN_IDS, FEW_ROWS, MANY_ROWS, ZERO, HIDDEN_ROWS, HIDDEN_INDEX, PREFILL_COUNT, PREFILL_TASKS) = range(len(NAMES))
