"""Training step of LymphMAEForPreTraining beside transformers' ViTMAEForPreTraining: same sizes, same precision.

Steps (forward, backward, fused AdamW) of the variants alternate in one run, so that whatever else the machine does
meets all of them alike; each ratio is the median over rounds of the time of transformers' step by the variant's. The
last column is what the step achieves of the rate of large matrix products in the same precision.

    python scripts/bench_mae.py --rounds 10
    python scripts/bench_mae.py --precision no --batch-size 8
    python scripts/bench_mae.py --device cuda --batch-size 256 --compile
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from lymph_hf.bench import clock_of, matrix_rate
from lymph_hf.configuration_mae import LymphMAEConfig
from lymph_hf.modeling_mae import LymphMAEForPreTraining

DEPTHS = {192: (12, 3), 384: (12, 6), 768: (12, 12)}  # width of the encoder -> blocks, heads
ENCODERS = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 768: "vit_base_patch16_224"}


def theirs(options: argparse.Namespace) -> torch.nn.Module:
    depth, heads = DEPTHS[options.width]
    config = ViTMAEConfig(
        hidden_size=options.width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * options.width,
        image_size=options.image_size,
        decoder_hidden_size=options.decoder_width,
        decoder_num_hidden_layers=options.decoder_depth,
        decoder_num_attention_heads=16,
        decoder_intermediate_size=4 * options.decoder_width,
        norm_pix_loss=True,
    )
    return ViTMAEForPreTraining(config)


def ours(options: argparse.Namespace, **changes) -> torch.nn.Module:
    sizes = {
        "decoder_width": options.decoder_width,
        "decoder_depth": options.decoder_depth,
        "decoder_heads": 16,
    }
    config = LymphMAEConfig(encoder=ENCODERS[options.width], image_size=options.image_size, **(sizes | changes))
    return LymphMAEForPreTraining(config)


def stepper(
    model: torch.nn.Module, images: torch.Tensor, options: argparse.Namespace, now: Callable[[], float]
) -> Callable[[], float]:
    """A function that trains one step and returns its seconds."""
    model = model.to(options.device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    forward = torch.compile(model) if options.compile else model

    def step() -> float:
        start = now()
        with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"):
            loss = forward(images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return now() - start

    return step


def flops_per_image(model: torch.nn.Module, images: torch.Tensor) -> float:
    """Floating-point operations of a step's forward and backward pass."""
    # The counter knows the products that attention is made of, not every fused attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images[:2]).loss.backward()
    model.zero_grad()
    return counter.get_total_flops() / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="bf16", choices=("bf16", "no"))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--width", type=int, default=384, choices=sorted(DEPTHS))
    parser.add_argument("--decoder-depth", type=int, default=8)
    parser.add_argument("--decoder-width", type=int, default=512)
    parser.add_argument("--compile", action="store_true", help="torch.compile every variant")
    options = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randn(options.batch_size, 3, options.image_size, options.image_size, device=options.device)
    variants = {
        "transformers ViTMAE": theirs(options),
        "lymph, equal decoder": ours(options),
        "lymph, half of the hidden patches decoded": ours(options, decoded_share=0.5),
        "lymph, default decoder (4 blocks of 256)": ours(options, decoder_depth=4, decoder_width=256, decoder_heads=8),
    }
    now = clock_of(torch.device(options.device), torch.get_num_threads())
    steps = {name: stepper(model, images, options, now) for name, model in variants.items()}
    flops = {name: flops_per_image(model, images) for name, model in variants.items()}
    for step in steps.values():  # warm-up and compilation
        step(), step()
    rounds = [{name: step() for name, step in steps.items()} for _ in range(options.rounds)]
    peak = matrix_rate(torch.device(options.device), options.precision, now)
    reference = next(iter(steps))
    print(
        f"{ENCODERS[options.width]} at {options.image_size}, mask 0.75, {options.device}, precision "
        f"{options.precision}, batch {options.batch_size}, {torch.get_num_threads()} threads, "
        f"compile={options.compile}, median of {options.rounds} alternating rounds"
    )
    for name in steps:
        rate = options.batch_size / statistics.median(times[name] for times in rounds)
        ratios = sorted(times[reference] / times[name] for times in rounds)
        print(
            f"{name:45s} {rate:8.1f} images/s   ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to "
            f"{ratios[-1]:.2f})   {rate * flops[name] / 1e12:.3f} of {peak / 1e12:.2f} TFLOP/s "
            f"({rate * flops[name] / peak:.0%})"
        )


if __name__ == "__main__":
    main()
