import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lymph_hf import chunking
from lymph_hf.chunking import activation_bytes, cells_that_fit, encode_in_chunks, free_memory

DROPS = {"proj_drop_rate": 0.2, "attn_drop_rate": 0.1, "drop_path_rate": 0.3}


def make_encoder(name: str = "test_vit", dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    torch.manual_seed(0)
    if "vit" in name:
        options["img_size"] = 32
    return timm.create_model(name, num_classes=0, **options).to(dtype).train()


def make_cells(count: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def encode_keeping_all(encoder: nn.Module, cells: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """The same chunks with every activation kept: what must come out, by plain autograd."""
    return torch.cat([encoder(chunk) for chunk in cells.tensor_split(-(-len(cells) // chunk_size))])


def loss_and_gradients(encoder: nn.Module, encode, cells: torch.Tensor, *args) -> dict[str, torch.Tensor]:
    """A loss in which cells of different chunks meet, as in a pooling, and its gradients."""
    encoder.zero_grad()
    torch.manual_seed(7)
    embeddings = encode(encoder, cells, *args)
    loss = (embeddings.softmax(dim=0) * embeddings).sum()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def assert_all_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-10):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


class Calls:
    """Number of forward passes of a module, those that stop early included."""

    def __init__(self, module: nn.Module):
        self.count = 0
        module.register_forward_pre_hook(self._note)

    def _note(self, *_):
        self.count += 1


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes in tensors made under this mode and still alive; the images do not count."""

    def __init__(self, images: torch.Tensor):
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet([images.untyped_storage()])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage):
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int):
        self.now -= size


def peak_of_step(encoder: nn.Module, cells: torch.Tensor, chunk_size: int | None) -> int:
    with LiveBytes(cells) as live:
        encode_in_chunks(encoder, cells, chunk_size).sum().backward()
    encoder.zero_grad()
    return live.peak


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_gradients_are_those_of_all_cells_at_once(name):
    encoder, cells = make_encoder(name), make_cells(11)
    expected = loss_and_gradients(encoder, lambda encoder, cells: encoder(cells), cells)
    for chunk_size in (1, 4, 10):
        assert_all_close(loss_and_gradients(encoder, encode_in_chunks, cells, chunk_size), expected)


def test_gradients_with_dropout_and_stochastic_depth():
    encoder, cells = make_encoder(**DROPS), make_cells(11)
    expected = loss_and_gradients(encoder, encode_keeping_all, cells, 4)
    assert_all_close(loss_and_gradients(encoder, encode_in_chunks, cells, 4), expected)
    # The masks matter: without them the result is another one.
    assert not torch.allclose(loss_and_gradients(encoder.eval(), encode_in_chunks, cells, 4)["loss"], expected["loss"])


def test_gradient_of_the_images():
    encoder, cells = make_encoder(), make_cells(5).requires_grad_()
    encoder.requires_grad_(False)
    (expected,) = torch.autograd.grad(encoder(cells).square().sum(), cells)
    (actual,) = torch.autograd.grad(encode_in_chunks(encoder, cells, 2).square().sum(), cells)
    torch.testing.assert_close(actual, expected)


def test_predecessor_fault_7_memory_does_not_grow_with_the_bag():
    encoder = make_encoder(dtype=torch.float32)
    few, many = make_cells(16, torch.float32), make_cells(128, torch.float32)
    kept_few, kept_many = (peak_of_step(encoder, cells, None) for cells in (few, many))
    assert kept_many > 4 * kept_few  # the measure sees what it is meant to see
    assert peak_of_step(encoder, many, 8) < 1.2 * peak_of_step(encoder, few, 8)
    assert peak_of_step(encoder, many, 8) < kept_many / 4


def graph_nodes(tensor: torch.Tensor) -> int:
    """Nodes of the graph that autograd has built behind a tensor."""
    found, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [child for child, _ in node.next_functions]
    return len(found)


def test_the_graph_of_a_recomputed_chunk_is_one_node():
    encoder, cells = make_encoder(), make_cells(12)
    one = graph_nodes(encode_in_chunks(encoder, cells, 12))
    assert one > 50
    assert graph_nodes(encode_in_chunks(encoder, cells, 1)) <= one + 11 + 1  # and what joins the chunks


def test_only_what_must_be_recomputed_is():
    encoder, cells = make_encoder(dtype=torch.float32), make_cells(12, torch.float32)
    calls = Calls(encoder)

    def passes(chunk_size: int | None) -> int:
        calls.count = 0
        embeddings = encode_in_chunks(encoder, cells, chunk_size)
        if embeddings.requires_grad:
            embeddings.sum().backward()
        return calls.count

    assert passes(None) == passes(12) == passes(100) == 1
    assert passes(4) == 3 + 2  # the last chunk is not recomputed
    with torch.no_grad():
        assert passes(4) == 3
    encoder.requires_grad_(False)
    assert passes(4) == 3


def test_frozen_leading_blocks_keep_no_activation():
    encoder, cells = make_encoder(dtype=torch.float32), make_cells(4, torch.float32)
    everything = activation_bytes(encoder, cells)
    encoder.requires_grad_(False)
    encoder.blocks[-1].requires_grad_(True)
    assert activation_bytes(encoder, cells) < everything / (len(encoder.blocks) - 1)


def test_mixed_precision():
    encoder, cells = make_encoder(dtype=torch.float32, **DROPS), make_cells(10, torch.float32)
    # With its cache, the gradients of the chunks would be summed in bfloat16.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = loss_and_gradients(encoder, encode_keeping_all, cells, 4)
    with torch.autocast("cpu", torch.bfloat16):
        actual = loss_and_gradients(encoder, encode_in_chunks, cells, 4)
    assert_all_close(actual, expected, 1e-5)
    assert encode_in_chunks(encoder, cells, 4).dtype == torch.float32


def test_gradient_accumulation():
    encoder, cells = make_encoder(), make_cells(12)
    (encoder(cells[:5]).square().sum() + encoder(cells[5:]).square().sum()).backward()
    expected = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    for bag in (cells[:5], cells[5:]):
        encode_in_chunks(encoder, bag, 2).square().sum().backward()
    assert_all_close({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}, expected)


@pytest.mark.parametrize("what", ["encoder", "everything"])
def test_compiled(what):
    encoder, cells = make_encoder(depth=1), make_cells(8)
    expected = loss_and_gradients(encoder, encode_in_chunks, cells, 4)
    torch._dynamo.reset()
    if what == "encoder":
        compiled = torch.compile(encoder, backend="aot_eager")
        actual = loss_and_gradients(encoder, lambda _, cells: encode_in_chunks(compiled, cells, 4), cells)
    else:
        compiled = torch.compile(encode_in_chunks, backend="aot_eager")
        actual = loss_and_gradients(encoder, lambda encoder, cells: compiled(encoder, cells, 4), cells)
    torch._dynamo.reset()
    assert_all_close(actual, expected)


def test_running_statistics_count_each_chunk_once():
    cells = make_cells(12)
    kept, chunked = make_encoder("test_resnet"), make_encoder("test_resnet")
    expected = loss_and_gradients(kept, encode_keeping_all, cells, 4)
    assert_all_close(loss_and_gradients(chunked, encode_in_chunks, cells, 4), expected)
    assert_all_close(dict(chunked.named_buffers()), dict(kept.named_buffers()), 0)
    assert chunked.bn1.num_batches_tracked == 3
    assert chunked.bn1.momentum == kept.bn1.momentum == 0.1


def test_automatic_chunks_follow_the_free_memory(monkeypatch):
    encoder, cells = make_encoder(dtype=torch.float32), make_cells(70, torch.float32)
    each = activation_bytes(encoder, cells)
    free = {"bytes": int(each * 2 * 50.5)}  # half of it is for the activations
    monkeypatch.setattr(chunking, "free_memory", lambda device: free["bytes"])
    calls = Calls(encoder)

    def passes(count: int) -> int:
        calls.count = 0
        encode_in_chunks(encoder, cells[:count], "auto").sum().backward()
        return calls.count

    assert cells_that_fit(encoder, cells) == 50
    assert passes(32) == 1
    assert passes(70) == 3 + 2  # of chunks of 32 one fits
    free["bytes"] = 10**15
    assert cells_that_fit(encoder, cells) == 50  # measured once: the same to the end of the run
    encoder.blocks[0].requires_grad_(False)  # another case, measured anew
    assert cells_that_fit(encoder, cells) > 10**6
    assert passes(70) == 3
    free["bytes"] = 1
    encoder.blocks[1].requires_grad_(False)
    assert cells_that_fit(encoder, cells) == 1
    assert passes(3) == 3 + 2
    with torch.no_grad():
        calls.count = 0
        encode_in_chunks(encoder, cells, "auto")
    assert calls.count == 5  # of 16 cells; nothing is measured where nothing is kept


def test_the_free_memory_does_not_change_the_result(monkeypatch):
    """A run goes on bit for bit on a machine with more memory."""
    cells, results = make_cells(70, torch.float32), []
    for precision in (torch.float32, torch.bfloat16):
        for free in (65, 140, 10**9):  # fits 32, 70 and all
            encoder = make_encoder(dtype=torch.float32, **DROPS)
            each = activation_bytes(encoder, cells)
            monkeypatch.setattr(chunking, "free_memory", lambda device, size=int(free * each): size)
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                results.append(loss_and_gradients(encoder, encode_in_chunks, cells, "auto"))
        few, some, many = results[-3:]
        assert_all_close(few, many, 0)
        assert_all_close(some, many, 0)


def test_measuring_memory_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(chunking, "free_memory", lambda device: 10**15)
    encoder, cells = make_encoder("test_resnet", drop_path_rate=0.3), make_cells(6)
    buffers = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    cells_that_fit(encoder, cells)
    assert torch.equal(torch.get_rng_state(), state)
    assert_all_close(dict(encoder.named_buffers()), buffers, 0)
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_free_memory_is_shared_among_the_processes_of_a_machine(monkeypatch):
    free = free_memory(torch.device("cpu"))
    if free is None:
        pytest.skip("this system does not tell its free memory")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0 < free_memory(torch.device("cpu")) < free / 2


@pytest.mark.parametrize("chunk_size", [0, -1, 2.5, "all"])
def test_a_wrong_chunk_size_is_refused(chunk_size):
    with pytest.raises(ValueError, match='at least 1, "auto" or None'):
        encode_in_chunks(nn.Identity(), make_cells(2), chunk_size)


TWO_PROCESSES = """
import sys, types
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

package = sys.modules["lymph_hf"] = types.ModuleType("lymph_hf")
package.__path__ = [sys.argv[1]]  # it needs nothing but torch
from lymph_hf import chunking

class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 4))
        self.encoder[1].requires_grad_(False)

    def forward(self, cells, chunk_size):
        embeddings = chunking.encode_in_chunks(self.encoder, cells, chunk_size)
        return (embeddings.softmax(dim=0) * embeddings).sum()

def gradients(model):
    return [p.grad for p in model.parameters() if p.grad is not None]

dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=int(sys.argv[2]), world_size=2)
torch.manual_seed(0)
model = Bags().double()
bags = [torch.randn(n, 3, 2, 2, dtype=torch.float64) for n in (3, 11)]  # of different size: other numbers of chunks
(sum(model(bag, None) for bag in bags) / 2).backward()
expected = [g.clone() for g in gradients(model)]
model.zero_grad()
parallel = DistributedDataParallel(model)
parallel(bags[dist.get_rank()], 4).backward()
for actual, wanted in zip(gradients(model), expected, strict=True):
    torch.testing.assert_close(actual, wanted)
assert len(expected) == 2
del parallel  # its threads end before those of the group, and neither process leaves while the other still talks
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes(tmp_path):
    arguments = [sys.executable, "-c", TWO_PROCESSES, str(Path(chunking.__file__).parent)]
    meeting = str(tmp_path / "meeting")
    processes = [
        subprocess.Popen([*arguments, str(rank), meeting], stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
