"""The host's half of a layer against NumPy: writing, attending, skipping what somebody else attends over."""
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from edge_runtime.kernels.attention_reference import attend, unpack
from edge_runtime.kernels.kv_record import RecordLayout
from edge_runtime.offload.host_attention import HostAttention
from edge_runtime.offload.host_rows import HostRows, HostSlice
from edge_runtime.offload.page_table import PageTable
from edge_runtime.offload.page_values import read_pages
from edge_runtime.offload.pages import KVLayout, PagePool

LAYERS = 2


def shape(heads=8, kv_heads=2, head_size=64):
    return SimpleNamespace(heads=heads, kv_heads=kv_heads, head_size=head_size, group=heads // kv_heads,
                           q_width=heads * head_size, kv_width=kv_heads * head_size)


@pytest.fixture(params=["int8", "fp16"])
def subject(request):
    config = shape()
    layout = KVLayout(LAYERS, config.kv_heads, config.head_size, request.param)
    host = HostAttention(config, layout)
    yield SimpleNamespace(config=config, layout=layout, host=host, pool=PagePool(layout, 64 << 20),
                          rng=np.random.default_rng(7))
    host.close()


def filled(subject, tokens):
    """A table of `tokens` random tokens in all layers, and those of layer 1 as attention sees them, [T, K, D] each."""
    table = PageTable(subject.pool)
    table.reserve(tokens)
    qkv = [subject.rng.standard_normal((tokens, subject.host._width)).astype(np.float32) for _ in range(LAYERS)]
    rows = HostRows(subject.config, [HostSlice(table.addresses, 0, tokens, prompt=True)])
    subject.host.store(range(LAYERS), qkv, rows).result()
    table.advance(tokens)
    return table


def seen(subject, table, stop):
    k, v = read_pages(table.addresses, subject.layout, 0, stop, range(1, 2))[0]
    return k.transpose(1, 0, 2), v.transpose(1, 0, 2)


def split(subject, qkv):
    c = subject.config
    q, k, v = np.split(qkv, [c.q_width, c.q_width + c.kv_width], axis=1)
    return (q.reshape(-1, c.heads, c.head_size), k.reshape(-1, c.kv_heads, c.head_size),
            v.reshape(-1, c.kv_heads, c.head_size))


def test_what_is_written_can_be_read(subject):
    table = filled(subject, 150)
    new = subject.rng.standard_normal((1, subject.host._width)).astype(np.float32)
    table.reserve(1)
    rows = HostRows(subject.config, [HostSlice(table.addresses, 150)])
    before = new.copy()
    subject.host.submit(1, new, rows).result()
    np.testing.assert_array_equal(new, before)  # queries and keys came rotated and stay so
    _, k, v = split(subject, new)
    got_k, got_v = (part[150] for part in seen(subject, table, 151))
    error = 1 / 127 if subject.layout.dtype == "int8" else 1e-3
    assert np.abs(got_k - k[0]).max() <= error * np.abs(k).max()
    assert np.abs(got_v - v[0]).max() <= error * np.abs(v).max()


@pytest.mark.parametrize("skips", [(0, 0), (64, 0), (128, 192)])
def test_decoded_rows_and_prompts_match_numpy_and_merge_with_the_skipped_part(subject, skips):
    first, second = filled(subject, 200), filled(subject, 260)
    first.reserve(1)
    second.reserve(70)
    rows = HostRows(subject.config, [HostSlice(first.addresses, 200, skip=skips[0]),
                                     HostSlice(second.addresses, 260, 70, prompt=True, skip=skips[1])])
    qkv = subject.rng.standard_normal((71, subject.host._width)).astype(np.float32)
    got = subject.host.submit(1, qkv, rows).result()
    assert rows.tokens == 201 - skips[0] + sum(range(261, 331)) - 70 * skips[1] and got.seconds > 0
    q, _, _ = split(subject, qkv)
    for table, position, at, skip in ((first, 200, slice(0, 1), skips[0]), (second, 260, slice(1, 71), skips[1])):
        count = at.stop - at.start
        k, v = seen(subject, table, position + count)
        want, lse = attend(q[at], k[skip:], v[skip:], position - skip)
        np.testing.assert_allclose(got.output[at], want.reshape(count, -1), atol=4e-3)
        if got.lse is not None:
            np.testing.assert_allclose(got.lse[at], lse, atol=4e-3)
    assert (got.lse is None) == (skips == (0, 0))


def test_refuses_what_it_would_read_wrongly(subject):
    table = filled(subject, 100)
    with pytest.raises(ValueError, match="multiples of 64"):
        HostRows(subject.config, [HostSlice(table.addresses, 99, skip=32)])
    with pytest.raises(ValueError, match="before prompts"):
        HostRows(subject.config, [HostSlice(table.addresses, 90, 10, prompt=True), HostSlice(table.addresses, 99)])
    rows = HostRows(subject.config, [HostSlice(table.addresses, 99)])
    with pytest.raises(ValueError, match="C-contiguous"):
        subject.host.submit(0, np.zeros((2, subject.host._width), np.float32), rows).result()


def test_pages_are_read_as_the_kernels_see_them(subject):
    table, layout = filled(subject, 200), subject.layout
    got = read_pages(table.addresses, layout, 70, 190)
    for token in (70, 127, 128, 189):
        for layer in range(LAYERS):
            for head in range(layout.kv_heads):
                at = (layer * layout.kv_heads + head) * layout.record_bytes
                record = subject.pool.view(table.pages[token // 64])[at:at + layout.record_bytes]
                k, v = unpack(record, RecordLayout(layout.dtype, layout.head_size))
                np.testing.assert_array_equal(got[layer, 0, head, token - 70], k[token % 64])
                np.testing.assert_array_equal(got[layer, 1, head, token - 70], v[token % 64])
