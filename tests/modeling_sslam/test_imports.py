"""`import modeling_sslam` imports little, but makes all classes available."""

import json
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers

import modeling_sslam
from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMForPreTraining

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
OPTIONAL = ("torchaudio", "datasets", "scipy", "soundfile", "matplotlib")
LIST_OPTIONAL = f"import sys; print([name for name in {OPTIONAL} if name in sys.modules])"


def run(script: str, *arguments: str) -> str:
    """Run a script in a new process and return its output."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture
def saved(tmp_path, make_config) -> Path:
    SSLAMForAudioClassification(make_config(num_mel_bins=128, num_labels=3)).save_pretrained(tmp_path)
    SSLAMFeatureExtractor(max_length=64).save_pretrained(tmp_path)
    return tmp_path


def test_import_brings_no_optional_package():
    assert run(f"import modeling_sslam; modeling_sslam.SSLAMConfig(); {LIST_OPTIONAL}") == "[]"
    # Before version 5 transformers' own Auto classes import scipy.
    auto_classes = run(f"from transformers import AutoConfig, AutoFeatureExtractor, AutoModel; {LIST_OPTIONAL}")
    both = "import modeling_sslam; from transformers import AutoConfig, AutoFeatureExtractor, AutoModel"
    assert run(f"{both}; {LIST_OPTIONAL}") == auto_classes
    if int(transformers.__version__.split(".")[0]) >= 5:
        assert auto_classes == "[]"


def test_optional_packages_are_installed():
    """Without these packages the test above would show nothing."""
    assert [name for name in OPTIONAL if find_spec(name) is None] == []


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        ("transformers.AutoConfig.from_pretrained(folder)", "configuration_sslam.SSLAMConfig"),
        (
            "transformers.AutoFeatureExtractor.from_pretrained(folder)",
            "feature_extraction_sslam.SSLAMFeatureExtractor",
        ),
        ("transformers.AutoModel.from_pretrained(folder)", "modeling_sslam.SSLAMModel"),
        ("transformers.AutoModel.from_config(modeling_sslam.SSLAMConfig())", "modeling_sslam.SSLAMModel"),
        (
            "transformers.AutoModelForAudioClassification.from_pretrained(folder)",
            "modeling_sslam.SSLAMForAudioClassification",
        ),
        (
            "transformers.AutoModelForPreTraining.from_pretrained(folder)",
            "modeling_sslam_pretraining.SSLAMForPreTraining",
        ),
        (
            "transformers.pipeline('audio-classification', folder).model",
            "modeling_sslam.SSLAMForAudioClassification",
        ),
        (
            "transformers.pipeline('audio-classification', folder).feature_extractor",
            "feature_extraction_sslam.SSLAMFeatureExtractor",
        ),
    ],
)
def test_auto_classes_after_the_import_alone(saved, load, expected):
    script = f"""
import sys, transformers, modeling_sslam
folder = sys.argv[1]
loaded = type({load})
assert loaded is getattr(modeling_sslam, loaded.__name__)
print(f"{{loaded.__module__}}.{{loaded.__name__}}")
"""
    assert run(script, str(saved)) == f"modeling_sslam.{expected}"


def test_stand_in_gives_way_to_its_class():
    script = """
import pickle, transformers, modeling_sslam
mapping = transformers.MODEL_MAPPING
stand_in = mapping[modeling_sslam.SSLAMConfig]
assert stand_in.__name__ == "SSLAMModel" and stand_in.__module__ == "modeling_sslam.modeling_sslam"
assert not hasattr(stand_in, "__wrapped__") and mapping[modeling_sslam.SSLAMConfig] is stand_in
assert stand_in.base_model_prefix == "sslam"
model_class = modeling_sslam.SSLAMModel
assert mapping[modeling_sslam.SSLAMConfig] is model_class
class Derived(stand_in):
    pass
assert Derived.__bases__ == (model_class,)
model = stand_in(modeling_sslam.SSLAMConfig(num_hidden_layers=1))
assert type(model) is model_class and isinstance(model, stand_in) and issubclass(model_class, stand_in)
assert pickle.loads(pickle.dumps(stand_in)) is model_class
"""
    run(script)


def test_tables_hold_the_classes_once_their_modules_are_imported():
    """The modules are imported in any order and by their own names."""
    script = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
import modeling_sslam, transformers
from modeling_sslam import feature_extraction_sslam, modeling_sslam_pretraining
config = modeling_sslam.SSLAMConfig
assert vars(modeling_sslam).get("SSLAMModel") is None
model_file = sys.modules["modeling_sslam.modeling_sslam"]
assert transformers.MODEL_MAPPING[config] is model_file.SSLAMModel
assert transformers.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING[config] is model_file.SSLAMForAudioClassification
assert transformers.MODEL_FOR_PRETRAINING_MAPPING[config] is modeling_sslam_pretraining.SSLAMForPreTraining
assert transformers.FEATURE_EXTRACTOR_MAPPING[config] is feature_extraction_sslam.SSLAMFeatureExtractor
class Derived(transformers.MODEL_MAPPING[config]):
    pass
Derived(config(num_hidden_layers=1))
"""
    for names in (
        ("modeling_sslam.modeling_sslam", "transformers.models.auto.modeling_auto"),
        ("modeling_sslam", "transformers.models.auto.modeling_auto", "modeling_sslam.modeling_sslam"),
    ):
        run(script, *names)


def test_stand_in_leaves_what_was_registered_meanwhile():
    script = """
import transformers, modeling_sslam
from transformers import AutoModel

stand_in = transformers.MODEL_MAPPING[modeling_sslam.SSLAMConfig]
class Other(transformers.PreTrainedModel):
    config_class = modeling_sslam.SSLAMConfig
AutoModel.register(modeling_sslam.SSLAMConfig, Other, exist_ok=True)
stand_in.load()
assert transformers.MODEL_MAPPING[modeling_sslam.SSLAMConfig] is Other
"""
    run(script)


def test_every_name_is_there():
    assert set(modeling_sslam.__all__) <= set(dir(modeling_sslam))
    names = json.loads(run("from modeling_sslam import *; import json; print(json.dumps(dir()))"))
    assert set(modeling_sslam.__all__) <= set(names)
    assert (
        run("import modeling_sslam; print(modeling_sslam.modeling_sslam.__name__)") == "modeling_sslam.modeling_sslam"
    )
    with pytest.raises(AttributeError, match="no attribute 'SSLAMTokenizer'"):
        modeling_sslam.SSLAMTokenizer  # noqa: B018
    with pytest.raises(ImportError, match="SSLAMTokenizer"):
        from modeling_sslam import SSLAMTokenizer  # noqa: F401


def test_classes_are_pickled_by_where_they_are_defined():
    for value in (SSLAMConfig, SSLAMFeatureExtractor, SSLAMForPreTraining):
        assert pickle.loads(pickle.dumps(value)) is value
    extractor = pickle.dumps(SSLAMFeatureExtractor(max_length=64))
    script = "import pickle, sys; print(type(pickle.loads(bytes.fromhex(sys.argv[1]))).__name__)"
    assert run(script, extractor.hex()) == "SSLAMFeatureExtractor"


def test_classes_are_registered_where_the_auto_classes_were_imported_before():
    script = """
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel
import modeling_sslam
config = AutoConfig.for_model("sslam", num_hidden_layers=1)
print(type(config).__name__, type(AutoModel.from_config(config)).__name__)
"""
    assert run(script) == "SSLAMConfig SSLAMModel"
