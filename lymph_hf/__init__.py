"""Patient-level blood-cell diagnosis on Hugging Face.

Importing the package registers its models with the Auto classes of transformers, so that
`AutoModel.from_pretrained("lymph-mil")` works.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForPreTraining

from .adapters import ADAPTERS, attach_adapter
from .configuration_ensemble import LymphMILEnsembleConfig
from .configuration_lymph import LymphMILConfig
from .configuration_mae import LymphMAEConfig
from .encoders import resolve_encoder
from .fusion import FUSERS
from .modeling_ensemble import LymphMILEnsembleForBagClassification
from .modeling_lymph import LymphMILForBagClassification, LymphMILModel
from .modeling_mae import LymphMAEForPreTraining
from .pipeline_lymph import LymphPatientPipeline
from .pooling import POOLERS
from .processing_lymph import ClinicalStandardizer, LymphImageProcessor
from .version import __version__

AutoConfig.register(LymphMILConfig.model_type, LymphMILConfig)
# A tuple: the class to build follows the `architectures` entry of the saved configuration.
AutoModel.register(LymphMILConfig, (LymphMILModel, LymphMILForBagClassification))
AutoImageProcessor.register(LymphMILConfig, image_processor_classes={"torchvision": LymphImageProcessor})

AutoConfig.register(LymphMILEnsembleConfig.model_type, LymphMILEnsembleConfig)
AutoModel.register(LymphMILEnsembleConfig, LymphMILEnsembleForBagClassification)
AutoImageProcessor.register(LymphMILEnsembleConfig, image_processor_classes={"torchvision": LymphImageProcessor})

AutoConfig.register(LymphMAEConfig.model_type, LymphMAEConfig)
AutoModel.register(LymphMAEConfig, LymphMAEForPreTraining)
AutoModelForPreTraining.register(LymphMAEConfig, LymphMAEForPreTraining)
AutoImageProcessor.register(LymphMAEConfig, image_processor_classes={"torchvision": LymphImageProcessor})

__all__ = [
    "ADAPTERS",
    "FUSERS",
    "POOLERS",
    "ClinicalStandardizer",
    "LymphImageProcessor",
    "LymphMAEConfig",
    "LymphMAEForPreTraining",
    "LymphMILConfig",
    "LymphMILEnsembleConfig",
    "LymphMILEnsembleForBagClassification",
    "LymphMILForBagClassification",
    "LymphMILModel",
    "LymphPatientPipeline",
    "__version__",
    "attach_adapter",
    "resolve_encoder",
]
