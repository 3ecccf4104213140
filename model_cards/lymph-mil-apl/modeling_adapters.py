"""Adapters through the verbs of transformers models: what transformers 5 leaves undone."""

from typing import Any


class AdapterLoading:
    """Mixin before `PreTrainedModel`."""

    def load_adapter(self, peft_model_id: str | None = None, adapter_name: str | None = None, **kwargs: Any) -> Any:
        """As in transformers; what it does not find under PEFT's names (the magnitudes of DoRA) PEFT loads itself."""
        info = super().load_adapter(peft_model_id, adapter_name, **kwargs)
        if info.missing_keys and peft_model_id is not None:
            from peft.utils import load_peft_weights, set_peft_model_state_dict

            download = getattr(kwargs.get("load_config"), "download_kwargs", None) or {}
            known = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")
            weights = load_peft_weights(
                peft_model_id, device="cpu", **{key: value for key, value in download.items() if key in known}
            )
            # PEFT writes the names as they are inside of a `PeftModel`.
            weights = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
            result = set_peft_model_state_dict(self, weights, adapter_name or "default")
            if result.unexpected_keys:
                raise ValueError(f"{peft_model_id} does not fit this model: {result.unexpected_keys}.")
            info.missing_keys, info.unexpected_keys = set(), set()
        return info

    def enable_adapters(self) -> None:
        """As in transformers, for the modules that are trained whole as well: `disable_adapters` disables them."""
        super().enable_adapters()
        from peft.utils.other import AuxiliaryTrainingWrapper

        for module in self.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                module.enable_adapters(enabled=True)
