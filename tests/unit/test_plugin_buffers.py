"""Memory that is used again: only what nobody looks at any more, and within its bound."""

from __future__ import annotations

import threading

import torch

from vllm_cocktail.buffers import SMALLEST, Buffers

NUMEL = SMALLEST // 2
SHAPE = torch.Size([NUMEL // 64, 64])


def test_a_tensor_is_whole_and_of_its_own() -> None:
    buffers = Buffers(2**30)
    first, second = (buffers.empty(SHAPE, torch.bfloat16).fill_(value) for value in (1, 2))
    assert (first.shape, first.dtype, first.is_contiguous()) == (SHAPE, torch.bfloat16, True)
    assert (first == 1).all()
    assert (second == 2).all()


def test_memory_comes_back_with_its_last_view() -> None:
    buffers = Buffers(2**30)
    tensor = buffers.empty(SHAPE, torch.bfloat16).fill_(1)
    address = tensor.data_ptr()
    view = tensor[3:5].view(torch.uint8)
    del tensor
    other = buffers.empty(SHAPE, torch.bfloat16).fill_(2)
    assert other.data_ptr() != address
    assert (view.view(torch.bfloat16) == 1).all()
    del view
    assert buffers.empty(SHAPE, torch.bfloat16).data_ptr() == address
    assert buffers.num_bytes == 2 * SMALLEST


def test_another_dtype_of_the_same_size_takes_it_too() -> None:
    buffers = Buffers(2**30)
    address = buffers.empty(torch.Size([NUMEL]), torch.bfloat16).data_ptr()
    assert buffers.empty(torch.Size([NUMEL // 2]), torch.float32).data_ptr() == address


def test_what_another_thread_lets_go_of_comes_back() -> None:
    buffers = Buffers(2**30)
    held = [buffers.empty(SHAPE, torch.bfloat16)]
    address = held[0].data_ptr()
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert buffers.empty(SHAPE, torch.bfloat16).data_ptr() == address


def test_idle_memory_makes_room_within_the_bound() -> None:
    buffers = Buffers(3 * SMALLEST)
    held = [buffers.empty(torch.Size([NUMEL]), torch.bfloat16) for _ in range(3)]
    held.clear()
    twice = buffers.empty(torch.Size([2 * NUMEL]), torch.bfloat16)
    assert buffers.num_bytes == 3 * SMALLEST
    more = [buffers.empty(torch.Size([NUMEL]), torch.bfloat16) for _ in range(3)]  # all are in use: the bound gives way
    assert buffers.num_bytes == 5 * SMALLEST
    del twice, more
    assert buffers.empty(torch.Size([4 * NUMEL]), torch.bfloat16).numel() == 4 * NUMEL
    assert buffers.num_bytes == 4 * SMALLEST


def test_small_and_empty_tensors_are_the_c_librarys() -> None:
    buffers = Buffers(2**30)
    assert buffers.empty(torch.Size([0]), torch.float32).shape == (0,)
    assert buffers.empty(torch.Size([]), torch.float32).shape == ()
    assert buffers.num_bytes == 0
