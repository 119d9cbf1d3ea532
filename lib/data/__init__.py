"""Data that ships with the book's requirements, constructed data, and loaders for public on-disk formats."""

from lib.data.digits import DIGIT_NAMES, digits
from lib.data.files import cifar10_binary, data_path, mnist_idx
from lib.data.synthetic import diverging_loss_pair, perceptron_hard_case
from lib.data.text import CharTokenizer, english_text, random_windows, token_windows

__all__ = [
    "DIGIT_NAMES",
    "CharTokenizer",
    "cifar10_binary",
    "data_path",
    "digits",
    "diverging_loss_pair",
    "english_text",
    "mnist_idx",
    "perceptron_hard_case",
    "random_windows",
    "token_windows",
]
