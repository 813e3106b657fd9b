"""Shared memory of kernels for GPUs: what `tiles_of` plans is what the lowering allows."""

from __future__ import annotations

import itertools

import pytest

from jaxquant.kernels.mosaic_gpu import SHARED_BYTES, blocks_of, shared_bytes, steps_of, tiles_of, unit_of


def test_buffers_begin_at_multiples_of_1024():
    assert shared_bytes(1, 1024, 1025) - shared_bytes() == 4096


def test_as_many_steps_as_there_is_room_for():
    assert steps_of([0], [10000], two=True) == 4
    assert steps_of([0], [70000], two=False) == 3
    assert steps_of([90000], [30000], two=True) == 4  # one program alone has room for more than two
    assert steps_of([SHARED_BYTES], [1], two=False) == 0


PRODUCTS = {
    "hopper": {"largest": 128},
    "blackwell": {"largest": 128, "smallest": 16, "outputs": 128},
    "integers": {"largest": 64},
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_products_always_have_two_steps(product):
    for rows, block, blocks, bits, out, itemsize in itertools.product(
        (1, 16, 17, 64, 300), (16, 32, 64, 128), (1, 2, 9, 12, 32), range(1, 9), (64, 128, 1536), (2, 4)
    ):
        for groups in (g for g in range(1, blocks + 1) if blocks % g == 0):
            width = blocks_of(blocks, block, groups) * block
            if not width or unit_of(bits, block) % 8 or (product == "integers" and block < 64):
                continue
            own = PRODUCTS[product] | {"itemsizes": (2, itemsize)}
            if product == "integers":
                own |= {"itemsizes": (4, itemsize), "kept": 16 * width, "row_bytes": 16 * width // 64}
            assert tiles_of(rows, (blocks, 0, out), block, groups, bits, **own).steps >= 2
