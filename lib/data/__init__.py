"""Data that ships with the book's requirements, constructed data, and loaders for public on-disk formats."""

from lib.data.context import graph_transitions, relevance_denoising
from lib.data.crops import crop_parameters, cutmix, paste_box, random_resized_crop, selfmix
from lib.data.crowd import cifar10h_crowd, rte_crowd, simulated_crowd
from lib.data.digits import DIGIT_NAMES, digits
from lib.data.files import cifar10_binary, cifar100_binary, data_path, mnist_idx
from lib.data.glyphs import GLYPH_STYLES, glyphs
from lib.data.known_information import gaussian_images, gaussian_pair, rectangle_images
from lib.data.names import character_names
from lib.data.patterns import szt_file, szt_patterns
from lib.data.photographs import photograph, photograph_crops, photographs
from lib.data.pointer_chase import PointerChase, visual_pointer_chase
from lib.data.recall import mqar
from lib.data.shifts import add_noise, blur, change_contrast, photo_patches, rotate, strokes
from lib.data.subword import refit_subwords, segment, train_subwords
from lib.data.synthetic import diverging_loss_pair, perceptron_hard_case
from lib.data.text import CharTokenizer, code_text, english_text, random_windows, token_windows
from lib.data.traffic import honeypot_traffic, kyoto_sessions
from lib.data.transforms import change_gamma, occlude, shift
from lib.data.volumes import cutmix3d, nrrd, paired_crops, phantoms

__all__ = [
    "CharTokenizer",
    "DIGIT_NAMES",
    "GLYPH_STYLES",
    "PointerChase",
    "add_noise",
    "blur",
    "change_contrast",
    "change_gamma",
    "character_names",
    "cifar100_binary",
    "cifar10_binary",
    "cifar10h_crowd",
    "code_text",
    "crop_parameters",
    "cutmix",
    "cutmix3d",
    "data_path",
    "digits",
    "diverging_loss_pair",
    "english_text",
    "gaussian_images",
    "gaussian_pair",
    "glyphs",
    "graph_transitions",
    "honeypot_traffic",
    "kyoto_sessions",
    "mnist_idx",
    "mqar",
    "nrrd",
    "occlude",
    "paired_crops",
    "paste_box",
    "perceptron_hard_case",
    "phantoms",
    "photo_patches",
    "photograph",
    "photograph_crops",
    "photographs",
    "random_resized_crop",
    "random_windows",
    "rectangle_images",
    "refit_subwords",
    "relevance_denoising",
    "rotate",
    "rte_crowd",
    "segment",
    "selfmix",
    "shift",
    "simulated_crowd",
    "strokes",
    "szt_file",
    "szt_patterns",
    "token_windows",
    "train_subwords",
    "visual_pointer_chase",
]
