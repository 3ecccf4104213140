"""What must hold for every whole model, for its loss, and for its way to disk and back."""

import functools
import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mil_cases import FUSER_CASES, POOLER_CASES
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel

from lymph_hf import FUSERS, POOLERS, LymphMILConfig, LymphMILForBagClassification, LymphMILModel

TINY = {"embed_dim": 16, "depth": 1, "num_heads": 2}
SIZES = (3, 1, 5)
NUM_LABELS = 3
LABELS = torch.tensor([0, 2, 1])
# Two standardised values and their gaps; a patient with all, one with some, one with none.
CLINICAL = torch.tensor([[0.5, -1.0, 1.5], [math.nan, 0.3, -0.7], [math.nan] * 3], dtype=torch.float64)
# Every pooling with every fusion; what an option opens with one partner. A fusion that does not call the pooling is the
# same with any of them.
CASES = [
    (pooling, fusion)
    for pooling in POOLER_CASES
    for fusion in FUSER_CASES
    if pooling == "gated_attention"
    or fusion == "concat"
    or (pooling in POOLERS and fusion in FUSERS and FUSERS[fusion].uses_pool)
]
ALL = pytest.mark.parametrize(("pooling", "fusion"), CASES, ids=["-".join(case) for case in CASES])


def make_config(pooling: str = "gated_attention", fusion: str = "concat", **options) -> LymphMILConfig:
    (pooling_name, pooling_options), (fusion_name, fusion_options) = POOLER_CASES[pooling], FUSER_CASES[fusion]
    defaults = {"num_labels": NUM_LABELS, "dropout": 0.0, "encoder": "test_vit", "encoder_options": TINY}
    return LymphMILConfig(
        image_size=16,
        pooling=pooling_name,
        pooling_options=pooling_options,
        fusion=fusion_name,
        fusion_options=fusion_options,
        **defaults | options,
    )


def make_model(pooling: str = "gated_attention", fusion: str = "concat", **options) -> LymphMILForBagClassification:
    """Seeded, in evaluation mode, in float64, which makes invariants exact."""
    torch.manual_seed(0)
    return LymphMILForBagClassification(make_config(pooling, fusion, **options)).double().eval()


@functools.cache
def shared_model(pooling: str, fusion: str) -> LymphMILForBagClassification:
    """For tests that only look."""
    return make_model(pooling, fusion).requires_grad_(False)


def make_batch(sizes=SIZES, *, extra: int = 0, padding: float = math.nan, seed: int = 0) -> dict[str, torch.Tensor]:
    """Gaussian pictures with `padding` in the places that hold no cell."""
    generator = torch.Generator().manual_seed(seed)
    bags = [torch.randn(size, 3, 16, 16, generator=generator, dtype=torch.float64) for size in sizes]
    mask = torch.arange(max(sizes) + extra) < torch.tensor(sizes)[:, None]
    pixel_values = torch.full((*mask.shape, 3, 16, 16), padding, dtype=torch.float64)
    pixel_values[mask] = torch.cat(bags)
    clinical = CLINICAL[torch.arange(len(sizes)) % len(CLINICAL)]
    return {"pixel_values": pixel_values, "bag_mask": mask, "clinical": clinical}


def pack(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    sizes = batch["bag_mask"].sum(dim=1)
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    return {
        "pixel_values": batch["pixel_values"][batch["bag_mask"]],
        "bag_offsets": offsets,
        "clinical": batch["clinical"],
    }


def bag(batch: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    """One patient alone, without padding and without a mask."""
    real = batch["bag_mask"][index]
    return {
        "pixel_values": batch["pixel_values"][index : index + 1, real],
        "clinical": batch["clinical"][index : index + 1],
    }


def reordered(batch: dict[str, torch.Tensor], seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Each bag's places, padding included, in an order of its own."""
    mask = batch["bag_mask"]
    order = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    pixel_values = batch["pixel_values"].gather(1, order[..., None, None, None].expand_as(batch["pixel_values"]))
    return {**batch, "pixel_values": pixel_values, "bag_mask": mask.gather(1, order)}, order


def states_equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# --- the contract, for every pooling with every fusion


@ALL
def test_shapes_and_weights(pooling, fusion):
    batch = make_batch(extra=2)
    model = shared_model(pooling, fusion)
    output = model(**batch)
    assert output.logits.shape == (3, NUM_LABELS)
    assert output.logits.isfinite().all()
    assert output.attentions.shape == batch["bag_mask"].shape
    assert (output.attentions[~batch["bag_mask"]] == 0).all()
    assert output.loss is None
    if model.model.pooler is None or model.model.pooler.is_attention:
        assert_close(output.attentions.sum(dim=1), torch.ones(3, dtype=output.attentions.dtype))


@ALL
def test_order_padding_and_neighbours_do_not_matter(pooling, fusion):
    model = shared_model(pooling, fusion)
    batch = make_batch()
    expected = model(**batch)
    for other in (make_batch(extra=4), make_batch(padding=1e30), make_batch(padding=0.0, extra=1), pack(batch)):
        output = model(**other)
        assert_close(output.logits, expected.logits)
        assert_close(output.attentions[:, : max(SIZES)], expected.attentions)
    moved, order = reordered(make_batch())
    output = model(**moved)
    assert_close(output.logits, expected.logits)
    assert_close(output.attentions, expected.attentions.gather(1, order))
    for index, size in enumerate(SIZES):
        alone = model(**bag(batch, index))
        assert_close(alone.logits[0], expected.logits[index])
        assert_close(alone.attentions[0], expected.attentions[index, :size])
        assert_close(alone.bag_embedding[0], expected.bag_embedding[index])


@given(
    case=st.sampled_from(CASES),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    extra=st.integers(0, 3),
    padding=st.sampled_from([math.nan, math.inf, -1e30, 0.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_ragged_batch_equals_its_patients_one_by_one(case, sizes, extra, padding, seed):
    model = shared_model(*case)
    batch, _ = reordered(make_batch(sizes, extra=extra, padding=padding, seed=seed), seed)
    alone = torch.cat([model(**bag(batch, index)).logits for index in range(len(sizes))])
    assert_close(model(**batch).logits, alone)
    assert_close(model(**pack(batch)).logits, alone)


@ALL
def test_every_cell_counts(pooling, fusion):
    batch = make_batch((2,))
    model = shared_model(pooling, fusion)
    before = model(**batch).logits
    for cell in range(2):
        changed = {**batch, "pixel_values": batch["pixel_values"].clone()}
        changed["pixel_values"][0, cell] *= -1
        assert torch.equal(model(**changed).logits, before) == (fusion == "clinical_only")


@ALL
def test_clinical_values_count_unless_they_are_left_out(pooling, fusion):
    batch = make_batch((2,))
    model = shared_model(pooling, fusion)
    before = model(**batch).logits
    # Far off to both sides: where the largest score decides, one of them is the largest.
    changed = [model(**{**batch, "clinical": batch["clinical"] + shift}).logits for shift in (-50, 50)]
    assert all(torch.equal(logits, before) for logits in changed) == (fusion == "none")


@ALL
def test_an_empty_bag_is_refused_wherever_it_stands(pooling, fusion):
    batch = make_batch()
    batch["bag_mask"][1] = False
    model = shared_model(pooling, fusion)
    with pytest.raises(ValueError, match="empty bag at index 1"):
        model(**batch)
    with pytest.raises(ValueError, match="empty bag at index 1"):
        model(**pack(batch))


def test_an_empty_bag_is_refused_before_anything_is_encoded():
    model, batch = make_model(), make_batch()
    batch["bag_mask"][:] = False
    model.model.encoder.register_forward_hook(lambda *_: pytest.fail("the encoder ran"))
    with pytest.raises(ValueError, match="empty bag at index 0, 1, 2"):
        model(**batch)


@ALL
def test_gradients_reach_every_parameter(pooling, fusion):
    model = make_model(pooling, fusion).train()
    model(**make_batch(), labels=LABELS).loss.backward()
    for name, parameter in model.named_parameters():
        unused = fusion == "clinical_only" and name.startswith("model.encoder.")
        reached = parameter.grad is not None and bool(parameter.grad.isfinite().all()) and bool(parameter.grad.any())
        assert reached != unused, name


@pytest.mark.parametrize("pooling", POOLER_CASES)
def test_lower_precision_gives_about_the_same(pooling):
    model = make_model(pooling).float()
    batch = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in make_batch().items()}
    with torch.no_grad():
        expected = model(**batch, labels=LABELS)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(**batch, labels=LABELS)
        low = model.bfloat16()(**batch, labels=LABELS)
    for output in (mixed, low):
        assert_close(output.logits.float(), expected.logits, atol=0.15, rtol=0.1)
        assert output.loss.dtype == torch.float32 and output.loss.isfinite()


@pytest.mark.parametrize("fusion", FUSER_CASES)
def test_lower_precision_works_with_every_fusion(fusion):
    output = make_model(fusion=fusion).bfloat16()(**make_batch(), labels=LABELS)
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.isfinite()


# --- inputs


@pytest.mark.parametrize("chunk_size", [1, 2, 8, 9, None, "auto"])
def test_the_chunk_size_does_not_change_the_answer(chunk_size):
    model = make_model(chunk_size=4)
    expected = model(**make_batch())
    model.config.chunk_size = chunk_size
    assert_close(model(**make_batch()).logits, expected.logits)


def test_cell_embeddings_take_the_place_of_images():
    model = make_model("attention", "film")
    batch = make_batch()
    cells = model.model(**batch).cell_embeddings
    assert (cells[~batch["bag_mask"]] == 0).all()
    cells[~batch["bag_mask"]] = math.nan
    output = model(cell_embeddings=cells, bag_mask=batch["bag_mask"], clinical=batch["clinical"])
    assert_close(output.logits, model(**batch).logits)
    unpadded = model(cell_embeddings=cells[2:], clinical=batch["clinical"][2:])
    assert_close(unpadded.logits, output.logits[2:])


def test_no_clinical_values_are_all_missing():
    model, batch = make_model(), make_batch()
    missing = torch.full_like(batch["clinical"], math.nan)
    assert torch.equal(model(**{**batch, "clinical": None}).logits, model(**{**batch, "clinical": missing}).logits)


def test_a_mask_of_numbers_is_one_of_booleans():
    model, batch = make_model(), make_batch()
    assert torch.equal(model(**{**batch, "bag_mask": batch["bag_mask"].long()}).logits, model(**batch).logits)


@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        ({}, "Give pixel_values"),
        ({"pixel_values": torch.zeros(2, 3, 16, 16)}, r"must be \(patients, cells, 3, height, width\), got \(2, 3, 16"),
        ({"pixel_values": torch.zeros(2, 4, 3, 16, 16), "bag_mask": torch.ones(2, 3)}, r"bag_mask is \(2, 3\), exp"),
        ({"cell_embeddings": torch.zeros(2, 4, 16), "bag_mask": torch.ones(2, 3)}, r"bag_mask is \(2, 3\), expected"),
        ({"pixel_values": torch.zeros(2, 3, 16, 16), "bag_offsets": torch.tensor([0, 3])}, "from 0 to T; got"),
        ({"pixel_values": torch.zeros(2, 3, 16, 16), "bag_offsets": torch.tensor([1, 2])}, "from 0 to T; got"),
        ({"pixel_values": torch.zeros(4, 3, 16, 16), "bag_offsets": torch.tensor([0, 3, 2, 4])}, "from 0 to T; got"),
        ({"pixel_values": torch.zeros(1, 2, 3, 16, 16), "bag_offsets": torch.tensor([0, 1])}, "from 0 to T; got"),
        (
            {
                "pixel_values": torch.zeros(2, 3, 16, 16),
                "bag_offsets": torch.tensor([0, 2]),
                "bag_mask": torch.ones(1, 2),
            },
            "not both",
        ),
        ({"pixel_values": torch.zeros(1, 2, 3, 16, 16), "clinical": torch.zeros(1, 2)}, r"clinical must have shape"),
    ],
)
def test_inputs_that_do_not_fit_together_are_refused(inputs, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_model()(**inputs)


def test_instance_scores_are_not_made_into_attention_by_the_fusion():
    """Sums give every cell the weight 1, also when the clinical values join them as one more element."""
    output = make_model("sum", "clinical_token")(**make_batch())
    assert_close(output.attentions.sum(dim=1), torch.tensor(SIZES, dtype=output.attentions.dtype))


@pytest.mark.parametrize("fusion", ["clinical_query", "clinical_only"])
def test_a_pooling_that_is_never_called_is_not_in_the_model(fusion):
    model = make_model(fusion=fusion)
    assert not [name for name, _ in model.named_parameters() if "pooler" in name]


# --- the loss


def cross_entropy(logits: torch.Tensor, label: int, smoothing: float = 0.0) -> torch.Tensor:
    target = torch.full((NUM_LABELS,), smoothing / NUM_LABELS, dtype=logits.dtype)
    target[label] += 1 - smoothing
    return -(target * logits.log_softmax(dim=-1)).sum()


def test_fault_6_every_patient_counts_once_whatever_the_number_of_cells():
    """The loss was divided by the size of the bag, so that patients with many cells counted less."""
    model, batch = make_model(), make_batch((1, 9, 2))
    losses = [model(**bag(batch, i), labels=LABELS[i : i + 1]).loss for i in range(3)]
    logits = model(**batch).logits
    for loss, row, label in zip(losses, logits, LABELS, strict=True):
        assert_close(loss.double(), cross_entropy(row, label), rtol=1e-5, atol=1e-6)
    assert_close(model(**batch, labels=LABELS).loss, torch.stack(losses).mean())


@pytest.mark.parametrize("pooling", [case for case in POOLER_CASES if case.startswith(("clam", "dsmil", "dtfd"))])
def test_a_loss_of_the_pooling_is_added_and_also_counts_patients(pooling):
    model, batch = make_model(pooling), make_batch()
    losses = [model(**bag(batch, i), labels=LABELS[i : i + 1]).loss for i in range(3)]
    output = model(**batch, labels=LABELS)
    assert_close(output.loss, torch.stack(losses).mean())
    plain = torch.stack([cross_entropy(row, label) for row, label in zip(output.logits, LABELS, strict=True)]).mean()
    assert output.loss > plain
    auxiliary = model.model(**batch, labels=LABELS).auxiliary_loss
    assert_close(output.loss.double(), plain + auxiliary, rtol=1e-5, atol=1e-6)


def test_class_weights_keep_their_effect_with_one_patient_per_batch():
    """A weighted mean divides by the weights it finds: alone in its batch, every patient would weigh the same."""
    weights = [0.5, 2.0, 4.0]
    model, plain = make_model(class_weights=weights), make_model()
    batch = make_batch()
    for index, label in enumerate(LABELS):
        alone = bag(batch, index)
        one = label[None]
        assert_close(model(**alone, labels=one).loss, weights[label] * plain(**alone, labels=one).loss)
    expected = [weights[y] * cross_entropy(z, y) for z, y in zip(model(**batch).logits, LABELS, strict=True)]
    assert_close(model(**batch, labels=LABELS).loss.double(), torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)


def test_label_smoothing():
    model, batch = make_model(label_smoothing=0.2), make_batch()
    expected = [cross_entropy(z, y, 0.2) for z, y in zip(model(**batch).logits, LABELS, strict=True)]
    assert_close(model(**batch, labels=LABELS).loss.double(), torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", ["gated_attention", "clam_mb", "dsmil", "instance_logits"])
def test_a_single_output_is_a_regression(pooling):
    model, batch = make_model(pooling, num_labels=1), make_batch()
    targets = torch.tensor([3.5, -1.0, 0.25])
    output = model(**batch, labels=targets)
    assert output.logits.shape == (3, 1)
    expected = (output.logits[:, 0] - targets).square().mean()
    assert_close(output.loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(model(**batch, labels=targets[:, None]).loss, output.loss)


# --- building


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ({"pooling": "atention"}, "pooling must be one of attention, .*; got 'atention'"),
        ({"fusion": "concatenate"}, "fusion must be one of .*concat.*; got 'concatenate'"),
        ({"encoder": "vit_tinny_patch16_224"}, "encoder='vit_tinny_patch16_224'.*Near: vit_tiny_patch16_224"),
        ({"pooling_options": {"hidden": 3}}, "'gated_attention' has no option 'hidden'.*hidden_size"),
        ({"fusion_options": {"size": 3}}, "'concat' has no option 'size'.*clinical_size"),
        ({"encoder_options": {"layers": 3}}, "encoder='test_vit' cannot be built with .*layers"),
        ({"clinical_features": []}, "ConcatFusion needs a clinical variable"),
    ],
)
def test_fault_8_unknown_names_are_refused_and_the_legal_ones_listed(name, complaint):
    """An unknown aggregation returned its input, and an unknown adapter trained without one."""
    with pytest.raises(ValueError, match=complaint):
        LymphMILForBagClassification(LymphMILConfig(**{"encoder": "test_vit", "image_size": 32} | name))


def test_parts_keep_the_initialisation_of_their_authors():
    torch.manual_seed(0)
    expected = timm.create_model("test_vit", num_classes=0, img_size=16, **TINY)
    torch.manual_seed(0)
    assert states_equal(LymphMILModel(make_config()).encoder, expected)


def test_the_seed_decides_the_weights():
    assert states_equal(make_model("transmil", "film"), make_model("transmil", "film"))


# --- to disk and back

STORED = [(pooling, "concat") for pooling in POOLERS] + [("mean", fusion) for fusion in FUSERS if fusion != "concat"]


@pytest.mark.parametrize(("pooling", "fusion"), STORED, ids=["-".join(case) for case in STORED])
def test_a_saved_model_comes_back_bit_for_bit(pooling, fusion, tmp_path):
    model = make_model(pooling, fusion).float()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.01 * torch.rand_like(tensor)
    model.save_pretrained(tmp_path)
    reloaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(reloaded) is LymphMILForBagClassification
    assert not reloaded.training
    assert not any(info.values()), info
    assert states_equal(reloaded, model)
    batch = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in make_batch().items()}
    with torch.no_grad():
        assert_close(reloaded(**batch).logits, model(**batch).logits)


def test_a_folder_called_lymph_mil_is_loaded_by_its_name(tmp_path, monkeypatch):
    model = make_model().float()
    model.save_pretrained(tmp_path / "lymph-mil")
    monkeypatch.chdir(tmp_path)
    assert states_equal(AutoModel.from_pretrained("lymph-mil"), model)
    assert type(AutoConfig.from_pretrained("lymph-mil")) is LymphMILConfig


def test_shards(tmp_path):
    model = make_model().float()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert states_equal(AutoModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize(("pooling", "fusion"), [("transmil", "clinical_token"), ("clam_mb", "mixture_of_experts")])
def test_half_the_memory(pooling, fusion, tmp_path):
    model = make_model(pooling, fusion).float()
    model.save_pretrained(tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in reloaded.parameters()} == {torch.bfloat16}
    assert states_equal(reloaded, model.bfloat16())
    with torch.no_grad():
        assert reloaded(**make_batch()).logits.isfinite().all()


def test_the_base_model_is_in_the_classifier_and_the_other_way_round(tmp_path):
    model = make_model().float()
    model.save_pretrained(tmp_path / "classifier")
    base, info = LymphMILModel.from_pretrained(tmp_path / "classifier", output_loading_info=True)
    assert states_equal(base, model.model)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    base.save_pretrained(tmp_path / "base")
    assert type(AutoModel.from_pretrained(tmp_path / "base")) is LymphMILModel
    torch.manual_seed(3)
    path = tmp_path / "base"
    again, info = LymphMILForBagClassification.from_pretrained(path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"]
    assert states_equal(again.model, model.model)
    assert again.classifier.weight.isfinite().all() and again.classifier.weight.std() > 0.01


def test_another_number_of_labels_starts_a_new_classifier_only(tmp_path):
    model = make_model().float()
    model.save_pretrained(tmp_path)
    reloaded, info = LymphMILForBagClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert reloaded.classifier.weight.shape[0] == 5
    assert reloaded.classifier.weight.isfinite().all() and 0.01 < reloaded.classifier.weight.std() < 1
    assert states_equal(reloaded.model, model.model)
    assert {key[0] for key in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LymphMILForBagClassification.from_pretrained(tmp_path, num_labels=5)


@pytest.fixture
def _nan_in_fresh_memory():
    """PyTorch then fills memory that nobody has written yet with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_nan_in_fresh_memory")
def test_what_a_checkpoint_lacks_is_initialised_and_what_it_holds_stays(tmp_path):
    """Tokens have no initialisation of their own: without care they would be whatever stood in memory."""
    model = make_model(pooling="set_transformer").float()
    for tensor in model.state_dict().values():
        tensor += 1
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lacking = ["model.encoder.cls_token", "model.encoder.blocks.0.norm1.bias", "model.encoder.blocks.0.attn.qkv.weight"]
    save_file({k: v for k, v in weights.items() if k not in lacking}, tmp_path / "model.safetensors", {"format": "pt"})
    reloaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(lacking)
    state = reloaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights.items() if name not in lacking)
    assert 0 < state["model.encoder.cls_token"].abs().max() < 0.2
    assert 0 < state["model.encoder.blocks.0.attn.qkv.weight"].abs().max() < 1
    assert (state["model.encoder.blocks.0.norm1.bias"] == 0).all()


def test_statistics_stay_where_only_a_part_of_a_norm_is_missing(tmp_path):
    """The norm's own scheme would also reset the running mean and variance that were loaded."""
    model = make_model(encoder="test_resnet", encoder_options=None).float()
    for tensor in model.state_dict().values():
        tensor += 1
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.encoder.bn1.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    state = AutoModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights.items())
    assert (state["model.encoder.bn1.weight"] == 1).all()


def test_recomputed_activations_give_the_same_gradients():
    def gradients(model):
        model.zero_grad()
        model(**make_batch(), labels=LABELS).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    model = make_model(encoder_options=TINY | {"depth": 3}).train()
    expected = gradients(model)
    model.activation_checkpointing_enable()
    assert model.model.encoder.grad_checkpointing
    for actual, plain in zip(gradients(model), expected, strict=True):
        assert_close(actual, plain)
    model.activation_checkpointing_disable()
    assert not model.model.encoder.grad_checkpointing
    model.model.activation_checkpointing_enable()
    assert model.model.encoder.grad_checkpointing


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_gives_the_same():
    model = make_model().float()
    batch = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in make_batch().items()}
    with torch.no_grad():
        compiled = torch.compile(model)
        for inputs in (batch, pack(batch), bag(batch, 2)):
            assert_close(compiled(**inputs).logits, model(**inputs).logits)


def test_a_model_without_its_encoder_answers_from_embeddings():
    """Features of a frozen encoder may be at hand; the mean of them has no parameter to tell a precision."""
    config = LymphMILConfig(encoder="test_vit", image_size=32, pooling="mean", fusion="none")
    model = LymphMILForBagClassification(config).eval()
    cells = torch.randn(2, 3, 3, 32, 32)
    with torch.no_grad():
        expected = model(cells).logits
        embeddings, mask = model.model.encode_bags(cells)
        model.model.encoder = None
        found = model(cell_embeddings=embeddings, bag_mask=mask).logits
    torch.testing.assert_close(found, expected)
