"""Networks and how they are trained; these names stand in the YAML files."""

from benchmarks.models.classification import ClassifierModule
from benchmarks.models.classifier import PairClassifier, SequenceClassifier
from benchmarks.models.language import LanguageModel, RecallModule

__all__ = [
    "ClassifierModule",
    "LanguageModel",
    "PairClassifier",
    "RecallModule",
    "SequenceClassifier",
]
