"""Write the tables of encoders, poolings and fusions into README.md, from timm, the registries and their docstrings.

Run it after adding one; `python scripts/readme_tables.py --check` only says whether the README is up to date.
"""

import inspect
import re
import sys
from pathlib import Path

import torch

from lymph_hf import LymphMAEConfig, LymphMAEForPreTraining, LymphMILConfig
from lymph_hf.encoders import build_encoder, embedding_size, encoder_data_config
from lymph_hf.fusion import FUSERS
from lymph_hf.pooling import POOLERS

ENCODERS = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_224.augreg_in21k",
    "vit_base_patch16_224",
    "vit_small_patch8_224.dino",
    "vit_small_patch16_224.dino",
    "vit_small_patch32_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "deit_tiny_patch16_224",
    "deit_small_distilled_patch16_224",
    "flexivit_small",
    "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m",
    "vit_medium_patch32_clip_224.tinyclip_laion400m",
    "beit_base_patch16_224",
    "levit_128s",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "convnext_atto",
    "convnextv2_atto",
    "resnet18",
    "resnet50",
    "efficientnet_b0",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small_035",
    "densenet121",
    "regnetx_002",
)
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- registries: begin -->\n", "<!-- registries: end -->"
SOURCE = re.compile(r"arXiv (\d{4}\.\d{4,5})|doi\s+(10\.[^\s,:)]+)|(hal-\d+)", re.IGNORECASE)


def row(name: str, kind: type) -> str:
    """`name | first sentence | first paper | options`."""
    text = " ".join(inspect.getdoc(kind).split("\n\n")[0].split())
    sentence = re.split(r"[.;](?:\s|$)|: `", text)[0].replace("|", "\\|")
    options = sorted(options_of(kind))
    return f"| `{name}` | {sentence} | {source(kind)} | {', '.join(f'`{option}`' for option in options)} |"


def encoder_row(name: str) -> str:
    """`name | side of the images | parameters | width of the embedding | masked autoencoder`."""
    config = LymphMILConfig(encoder=name)
    with torch.device("meta"):
        encoder = build_encoder(config)
    millions = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    side = encoder_data_config(config)["input_size"][-1]
    return f"| `{name}` | {side} | {millions:.1f} M | {embedding_size(encoder)} | {can_be_masked(name)} |"


def can_be_masked(name: str) -> str:
    """Whether `lymph pretrain` can mask the patches of this encoder."""
    try:
        with torch.device("meta"):
            LymphMAEForPreTraining(LymphMAEConfig(encoder=name))
    except ValueError:
        return ""
    return "yes"


def options_of(kind: type) -> set[str]:
    """Keyword options of a class, and of the parents it passes `**options` on to."""
    found: set[str] = set()
    for parent in kind.__mro__:
        parameters = inspect.signature(parent.__init__).parameters.values()
        found |= {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found - {"num_labels"}


def source(kind: type) -> str:
    """The first paper in the docstring, as a link."""
    found = SOURCE.search(inspect.getdoc(kind) + " ")
    if found is None:
        return ""
    arxiv, doi, hal = found.groups()
    if arxiv:
        return f"[arXiv {arxiv}](https://arxiv.org/abs/{arxiv})"
    return f"[doi](https://doi.org/{doi})" if doi else f"[{hal}](https://hal.science/{hal})"


def tables() -> str:
    """All tables in Markdown."""
    parts = ["\n| `--encoder` | image, pixels | parameters | embedding | `lymph pretrain --objective mae` |"]
    parts += ["|---|---|---|---|---|", *map(encoder_row, ENCODERS)]
    for title, registry in (("pooling", POOLERS), ("fusion", FUSERS)):
        parts += [f"\n| `--{title}` | what it does | source | options |", "|---|---|---|---|"]
        parts += [row(name, kind) for name, kind in registry.items()]
    return "\n".join(parts) + "\n"


def main() -> int:
    before = README.read_text(encoding="utf-8")
    head, rest = before.split(BEGIN)
    after = head + BEGIN + tables() + "\n" + END + rest.split(END, 1)[1]
    if "--check" in sys.argv:
        return int(before != after)
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
