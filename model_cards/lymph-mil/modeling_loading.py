"""Loading that can be trusted: safetensors only, errors that name the file, an adapter on the base it was made for."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, find_adapter_config_file

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Where a file is looked for, beside the name of the repository or folder.
_PLACE = ("revision", "subfolder", "token", "cache_dir", "local_files_only")
_FILES_OF_ADAPTERS = tuple(name for name in _PLACE if name not in ("revision", "subfolder"))
_QUIETLY = {
    f"_raise_exceptions_for_{reason}": False for reason in ("missing_entries", "connection_errors", "gated_repo")
}


@dataclass(frozen=True)
class _Adapter:
    """An adapter whose base lies elsewhere.

    Attributes:
        source, place: where its files are, as `cached_file` takes them.
        base, base_revision: what it was trained on; a revision of `None` is the newest.
    """

    source: str
    place: dict[str, Any]
    base: str
    base_revision: str | None


class CheckedLoading:
    """Mixin before `PreTrainedModel`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        adapter_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, and stricter.

        Weights are read from safetensors alone: a pickle can run any code when it is opened. An adapter is put on the
        revision of its base that its `adapter_config.json` names, with the configuration that lies beside the
        adapter: labels, calibration and threshold are its own, not those of the base.

        Raises:
            ValueError: `use_safetensors=False`.
            OSError: no weights in safetensors, or a file that is damaged; the message names it and says what to do.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False: pickled weights are not read, as they can run any code.")
        kwargs["use_safetensors"] = True
        source, given = pretrained_model_name_or_path, dict(adapter_kwargs or {})
        adapter = _separate_adapter(source, given, kwargs)
        if adapter is not None:
            if cached_file(adapter.source, ADAPTER_WEIGHTS, **adapter.place, **_QUIETLY) is None:
                raise OSError(_no_safetensors(adapter.source, ADAPTER_WEIGHTS))
            config = _config_beside(adapter, config, cls.config_class)
            given |= {"_adapter_model_path": adapter.source, "revision": adapter.place.get("revision")}
            source = adapter.base
            if adapter.base_revision is not None or source != pretrained_model_name_or_path:
                kwargs["revision"] = adapter.base_revision
        with _explained(source, kwargs, adapter):
            return super().from_pretrained(source, *model_args, config=config, adapter_kwargs=given, **kwargs)


def _separate_adapter(source, given: dict[str, Any], kwargs: dict[str, Any]) -> _Adapter | None:
    """The adapter that is asked for, unless it lies in one folder with its base."""
    name = given.get("_adapter_model_path", source)
    if name is None or (name == source and any(Path(name).glob("model*.safetensors"))):
        return None
    place = {key: kwargs[key] for key in _FILES_OF_ADAPTERS if key in kwargs}
    place["revision"] = given.get("revision", kwargs.get("revision") if name == source else None)
    path = find_adapter_config_file(name, **place)
    if path is None:
        return None
    settings = json.loads(Path(path).read_text(encoding="utf-8"))
    _refuse_unknown_method(name, settings.get("peft_type"))
    base = settings.get("base_model_name_or_path")
    if base is None:
        raise OSError(f"{name}: its adapter_config.json names no base_model_name_or_path. Publish it with its base.")
    return _Adapter(name, place, base, settings.get("revision"))


def _refuse_unknown_method(name: str, method: str | None) -> None:
    """PEFT's own methods need PEFT alone; those of lymph-hf register themselves when it is imported."""
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as METHODS
    except ImportError as error:
        raise OSError(f"{name} is an adapter, which needs PEFT: pip install peft.") from error
    if method not in METHODS:
        raise OSError(
            f"{name} is an adapter of the method {method}, which PEFT alone does not know: pip install lymph-hf, and "
            "import lymph_hf before loading it."
        )


def _config_beside(adapter: _Adapter, config, config_class: type[PreTrainedConfig]):
    """The configuration published with the adapter, in place of the base's; what the caller made stays."""
    if isinstance(config, PreTrainedConfig) and config.name_or_path != adapter.base:
        return config
    if cached_file(adapter.source, "config.json", **adapter.place, **_QUIETLY) is None:
        return config
    return config_class.from_pretrained(adapter.source, **adapter.place)


@contextmanager
def _explained(source, kwargs: dict[str, Any], adapter: _Adapter | None) -> Iterator[None]:
    """What fails because of a damaged or absent file as an error that names it."""
    try:
        yield
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and f"named {SAFE_WEIGHTS_NAME}" in str(error):
            raise OSError(_no_safetensors(source, SAFE_WEIGHTS_NAME)) from error
        places = [(source, {key: kwargs[key] for key in _PLACE if key in kwargs})]
        if adapter is not None:
            places.append((adapter.source, adapter.place))
        for name, place in places:
            if name is not None and (damaged := _damaged_file(name, place)):
                raise OSError(
                    f"{damaged}: damaged or incomplete safetensors. Download it again with force_download=True; a file "
                    "that was copied by hand has to have the SHA-256 that the Hub shows."
                ) from error
        raise


def _no_safetensors(source, name: str) -> str:
    return (
        f"{source} holds no {name}. Pickled weights (.bin, .pt) are not read, as opening one can run any code: where "
        "their source is trusted, read them with torch.load(path, weights_only=True) and write them with "
        "safetensors.torch.save_file."
    )


def _damaged_file(source, place: dict[str, Any]) -> Path | None:
    """The first file of weights at hand that cannot be opened."""
    place = {key: value for key, value in place.items() if value is not None} | {"local_files_only": True}
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **place, **_QUIETLY)
    shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values() if index else ()
    for name in (SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS, *sorted(set(shards))):
        path = cached_file(source, name, **place, **_QUIETLY)
        try:
            if path is not None:
                with safe_open(path, framework="pt"):
                    pass
        except (SafetensorError, OSError):
            return Path(path)
    return None
