"""Contenders of a linear evaluation: the frozen encoder and its rivals, with the features of all splits."""

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.contrib.logging import logging_redirect_tqdm

from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMModel
from modeling_sslam.onednn_sslam import use_onednn
from training.classification.classifier import compile_blocks, make_classifier
from training.classification.task import Task, evaluation_data
from training.data.config import DataConfig
from training.data.sources import Source
from training.linear.config import LinearEvalConfig
from training.linear.features import FeatureSet, cached_features, cached_tokens, cached_values
from training.linear.forest import cepstral_extractor
from training.linear.heads import TOKEN_KINDS, Head
from training.run.config import TrainingError

REMEDIES = {
    "validation": " (--data.hold_out 0.1 validates with a tenth of the training clips)",
    "test": " (--test_split null reports on the validation clips)",
}
FOREST = Head(0, "mean and deviation of MFCCs", "forest")


class FrozenEncoder(NamedTuple):
    """The encoder under evaluation, and its task.

    Attributes:
        model: A classifier for the task's classes that contains the encoder. Its own head is not used.
        feature_extractor: Computes its input.
        task: Classes and problem type.
    """

    model: SSLAMForAudioClassification
    feature_extractor: SSLAMFeatureExtractor
    task: Task


class Contender(NamedTuple):
    """An encoder or a baseline with its features, before its heads are fitted.

    Attributes:
        name: Name for tables.
        heads: The heads to fit.
        sets: The features of each split.
        seconds: Time to compute the features or to find them in the cache.
    """

    name: str
    heads: list[Head]
    sets: dict[str, FeatureSet]
    seconds: float


def freeze_encoder(config: LinearEvalConfig, task: Task, accelerator: Accelerator) -> FrozenEncoder:
    """Load the encoder in eval mode on the device, without gradients.

    Raises:
        TrainingError: If there is no such model, or settings contradict each other.
    """
    model, feature_extractor = make_classifier(
        config.model, task.labels, task.problem_type, config.features, config.classifier_pooling, drop_path_rate=0.0
    )
    if config.new_weights:
        set_seed(config.seed)
        model.sslam = SSLAMModel(SSLAMConfig.from_dict(model.config.to_dict()))
    if config.compile:
        compile_blocks(model)
    use_onednn(model.eval().requires_grad_(False).to(accelerator.device))
    return FrozenEncoder(model, feature_extractor, task)


def contender_of(
    name: str, config: LinearEvalConfig, encoder: FrozenEncoder, heads: list[Head], accelerator: Accelerator
) -> Contender:
    """Return an encoder with its features of all splits. Call it in every process."""
    started = time.perf_counter()
    layers = sorted({layer for head in heads if head.kind in TOKEN_KINDS and isinstance(layer := head.layer, int)})

    def features(source: Source) -> FeatureSet:
        states, extractor = encoder.model.sslam, encoder.feature_extractor
        found = cached_features(
            states,
            extractor,
            source,
            config.cache_dir,
            accelerator,
            batch_size=config.batch_size,
            dtype=config.cache_dtype,
        )
        if not layers:
            return found
        return cached_tokens(
            found,
            states,
            extractor,
            source,
            config.cache_dir,
            accelerator,
            layers=layers,
            batch_size=config.batch_size,
            max_bytes=config.token_cache_gib * 2**30,
        )

    sets = extract_splits(config, encoder.task, features)
    return Contender(name, heads, sets, time.perf_counter() - started)


def forest_of(config: LinearEvalConfig, encoder: FrozenEncoder, accelerator: Accelerator) -> Contender:
    """Return the random forest with the MFCC features of all splits. Call it in every process."""
    started = time.perf_counter()
    cepstra = cepstral_extractor(config.forest.coefficients)

    def features(source: Source) -> FeatureSet:
        frames = encoder.feature_extractor
        return cached_values(cepstra, frames, source, config.cache_dir, accelerator, config.batch_size, "float32")

    sets = extract_splits(config, encoder.task, features)
    return Contender("MFCC + forest", [FOREST], sets, time.perf_counter() - started)


def splits_of(config: LinearEvalConfig) -> dict[str, DataConfig]:
    """Return the settings of each split, by fold or by purpose. The training split includes the held-out clips."""
    training = replace(config.data, hold_out=0.0, held_out=False)
    if config.folds:
        return {fold: replace(training, split=fold) for fold in config.folds}
    names = {"validation": None if config.data.hold_out else config.validation_split, "test": config.test_split}
    splits: dict[str, DataConfig] = {"train": training}
    for part, name in names.items():
        if name is not None:
            data = evaluation_data(config.data, config.validation_source, name)
            splits[part] = replace(data, hold_out=0.0, held_out=False)
    return splits


def extract_splits(
    config: LinearEvalConfig, task: Task, features: Callable[[Source], FeatureSet]
) -> dict[str, FeatureSet]:
    """Return the features of all splits, from the cache or newly computed.

    Args:
        config: The settings.
        task: The task.
        features: Returns the features of a source.

    Raises:
        TrainingError: If a split cannot be read, or its patch tokens are too large.
        DataError: If its clips are unusable.
    """
    sets = {}
    for part, data in splits_of(config).items():
        try:
            with logging_redirect_tqdm():
                sets[part] = features(task.source.read_as(data))
        except (ValueError, FileNotFoundError) as error:
            where = f"data.source={data.source!r}, split {data.split!r}"
            raise TrainingError(f"{where}: {error}{REMEDIES.get(part, '')}") from error
    return sets


def check_apart(sets: dict[str, FeatureSet], by_fold: bool) -> None:
    """Check that no training clip is a test clip. All clips are both if the data have no splits.

    Args:
        sets: The features of the training clips and of other splits, or those of each fold.
        by_fold: Whether all splits are trained on. Otherwise only the first is.

    Raises:
        TrainingError: If a split shares clips with one that is trained on.
    """
    first, *others = sets.items()
    pairs = combinations(sets.items(), 2) if by_fold else ((first, other) for other in others)
    for (trained_on, train), (name, part) in pairs:
        rows = {id_: row for row, id_ in enumerate(train.ids)}
        # Equal names are not enough: in some data sets, clips of different splits share them.
        shared = [
            id_
            for id_, pooled in zip(part.ids, part.pooled, strict=True)
            if id_ in rows and (pooled == train.pooled[rows[id_]]).all()
        ]
        if shared and by_fold:
            raise TrainingError(
                f"{len(shared)} of the {len(part.ids)} clips of {name} are also in {trained_on}, such as {shared[0]}. "
                "Folds are splits of the data that share no clips."
            )
        if shared:
            raise TrainingError(
                f"{len(shared)} of the {len(part.ids)} {name} clips are training clips, such as {shared[0]}. If the "
                "data have no splits, give --data.hold_out 0.2 --test_split null."
            )
