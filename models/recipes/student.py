"""The network that a distillation begins with: the teacher made smaller, another file's weights, or new ones."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from edge_runtime.errors import InvalidRequestError, UnsupportedModelError
from edge_runtime.models.gguf_file import GGUFFile

from .config import NetworkConfig
from .distill_config import StudentConfig, check_exit_layers
from .network import Network
from .network_file import file_network_config, load_network_file
from .prune import even_layers, keep_layers, measure_importance, most_important, shrink


@dataclass(frozen=True)
class Student:
    """layer_map: for each layer of the student, the teacher's whose output it takes over, both from 1; None where the
    student was not made from the teacher."""

    network: Network
    layer_map: tuple[int, ...] | None


def make_student(config: StudentConfig, teacher: GGUFFile, calibration: Sequence[Tensor], seed: int = 0,
                 same_vocabulary: Callable[[GGUFFile], bool] = lambda file: True) -> Student:
    """The student that `config` describes. calibration: rows int64 [T] that decide what is pruned. same_vocabulary:
    whether a start file's tokens are the teacher's.

    InvalidRequestError: sizes that the start does not have, exit layers that the student does not have.
    UnsupportedModelError: another vocabulary than the teacher's, without which its distribution says nothing.
    """
    if config.start == "new":
        network = Network(_new_shape(config, file_network_config(teacher)), seed)
        check_exit_layers(config.exit_layers, network.config.layers)
        return Student(network, None)
    if config.start == "teacher":
        network, layers = _cut(config, teacher, calibration)
        return Student(network, tuple(layer + 1 for layer in layers))
    with GGUFFile(config.start) as file:
        _check_same(config.start, file_network_config(teacher), file_network_config(file), same_vocabulary(file))
        return Student(_cut(config, file, calibration)[0], None)


def _check_same(start: str, teacher: NetworkConfig, student: NetworkConfig, same_tokens: bool) -> None:
    if student.vocab_size != teacher.vocab_size or not same_tokens:
        raise UnsupportedModelError(
            f"a student ({start}, {student.vocab_size} tokens) with another vocabulary than its teacher's "
            f"({teacher.vocab_size} tokens)", (), "A teacher's probabilities are of its own tokens: start from a model "
            'with the same tokenizer, or with start = "teacher".')
    if student.architecture != teacher.architecture:
        raise UnsupportedModelError(f"a student of architecture {student.architecture} with a {teacher.architecture} "
                                    f"teacher", (), "Start from a model of the teacher's architecture.")


def _cut(config: StudentConfig, file: GGUFFile, calibration: Sequence[Tensor]) -> tuple[Network, list[int]]:
    """The file's network, with the layers, groups and channels that the config keeps; and its layers, from 0."""
    shape = file_network_config(file)
    layers = _chosen_layers(config, shape)
    check_exit_layers(config.exit_layers, len(layers) if layers else config.layers)
    for name, most in (("kv_heads", shape.kv_heads), ("ffn", shape.ffn)):
        if getattr(config, name) > most:
            raise InvalidRequestError(f"student.{name}", getattr(config, name), f"at most {most}, what the start has")
    if layers is None:
        whole = load_network_file(file)
        layers = most_important(measure_importance(whole, calibration).layers, config.layers)
        network = keep_layers(whole, layers)
    else:
        network = load_network_file(file, layers)
    kv_heads, ffn = (0 if size == full else size for size, full in ((config.kv_heads, shape.kv_heads),
                                                                    (config.ffn, shape.ffn)))
    if kv_heads or ffn:
        network = shrink(network, measure_importance(network, calibration), kv_heads=kv_heads, ffn=ffn)
    return network, layers


def _chosen_layers(config: StudentConfig, shape: NetworkConfig) -> list[int] | None:
    """From 0; None where the calibration text decides."""
    if config.keep:
        if config.keep[-1] > shape.layers:
            raise InvalidRequestError("student.keep", list(config.keep), f"layer numbers from 1 to {shape.layers}")
        return [layer - 1 for layer in config.keep]
    if config.layers > shape.layers:
        raise InvalidRequestError("student.layers", config.layers, f"at most {shape.layers}, what the start has")
    wanted = config.layers or shape.layers
    return even_layers(shape.layers, wanted) if config.choose == "even" or wanted == shape.layers else None


def _new_shape(config: StudentConfig, teacher: NetworkConfig) -> NetworkConfig:
    shape = replace(
        teacher, plant=False, width=config.width or teacher.width, layers=config.layers or teacher.layers,
        heads=config.heads or teacher.heads, kv_heads=config.kv_heads or teacher.kv_heads,
        head_size=config.head_size or teacher.head_size, ffn=config.ffn or teacher.ffn)
    if shape.heads % shape.kv_heads:
        raise InvalidRequestError("student.kv_heads", shape.kv_heads, f"a divisor of the {shape.heads} heads")
    if shape.head_size == teacher.head_size:
        return shape
    if shape.head_size % 2:
        raise InvalidRequestError("student.head_size", shape.head_size, "even: RoPE turns pairs of values")
    if teacher.rope_factors or (teacher.rope is not None and teacher.rope.scaling == "yarn"):
        raise InvalidRequestError("student.head_size", shape.head_size, f"the teacher's {teacher.head_size}, which its "
                                                                        f"scaled RoPE was made for")
    rope = teacher.rope
    return replace(shape, rope=None if rope is None else replace(rope, dimension_count=shape.head_size))
