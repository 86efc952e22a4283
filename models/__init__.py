"""Models: pairs of pure functions on nested dicts, made from Flax modules.

The networks are written in Flax NNX: its modules are ordinary Python classes whose
layers can be found by type and exchanged, which is what LoRA on a user's network
needs, and its parameters split off as plain arrays, which is all the rest of fedcl
sees. Linen modules enter by `from_linen`.
"""

if __name__ != "fedcl.models":
    raise ImportError(
        "import `fedcl.models`, not `models`: the repository root is on sys.path"
    )

from fedcl.models._accumulator import accumulated as accumulated
from fedcl.models._accumulator import merge_accumulator as merge_accumulator
from fedcl.models._accumulator import tapped as tapped
from fedcl.models._attention_adapter import attention_adapter as attention_adapter
from fedcl.models._clip import ClipConfig as ClipConfig
from fedcl.models._clip import ClipOutput as ClipOutput
from fedcl.models._clip import ClipTextConfig as ClipTextConfig
from fedcl.models._clip import clip as clip
from fedcl.models._clip import clip_text as clip_text
from fedcl.models._conv import PatchConv as PatchConv
from fedcl.models._conv import convnet as convnet
from fedcl.models._conv import pooled as pooled
from fedcl.models._decoder import DecoderConfig as DecoderConfig
from fedcl.models._decoder import decoder as decoder
from fedcl.models._dual_adapters import dual_adapters as dual_adapters
from fedcl.models._dual_adapters import own_adapter as own_adapter
from fedcl.models._dual_adapters import shared_or_own as shared_or_own
from fedcl.models._emulator import keep_layers as keep_layers
from fedcl.models._emulator import spread_layers as spread_layers
from fedcl.models._encoder import EncoderConfig as EncoderConfig
from fedcl.models._encoder import encoder as encoder
from fedcl.models._families import families as families
from fedcl.models._family import Family as Family
from fedcl.models._family import Source as Source
from fedcl.models._generate import generate as generate
from fedcl.models._licence import PERMISSIVE as PERMISSIVE
from fedcl.models._linen import from_linen as from_linen
from fedcl.models._lora import lora as lora
from fedcl.models._lora import merge_lora as merge_lora
from fedcl.models._lora import unmerge_lora as unmerge_lora
from fedcl.models._lora import with_rank as with_rank
from fedcl.models._mlp import mlp as mlp
from fedcl.models._model import Model as Model
from fedcl.models._model import from_nnx as from_nnx
from fedcl.models._named_classes import named_classes as named_classes
from fedcl.models._peft import biases as biases
from fedcl.models._peft import bottleneck as bottleneck
from fedcl.models._peft import ia3 as ia3
from fedcl.models._peft import merge_ia3 as merge_ia3
from fedcl.models._peft_format import load_adapter as load_adapter
from fedcl.models._peft_format import save_adapter as save_adapter
from fedcl.models._pretrained import Pretrained as Pretrained
from fedcl.models._pretrained import load as load
from fedcl.models._prompt_pools import coda_prompt as coda_prompt
from fedcl.models._prompt_pools import dualprompt as dualprompt
from fedcl.models._prompt_pools import l2p as l2p
from fedcl.models._prompt_pools import prompt_loss as prompt_loss
from fedcl.models._prompts import prefix as prefix
from fedcl.models._prompts import soft_prompt as soft_prompt
from fedcl.models._quantised import dequantise as dequantise
from fedcl.models._quantised import quantise as quantise
from fedcl.models._random_projection import random_projection as random_projection
from fedcl.models._save import save as save
from fedcl.models._tokenizer import check_ids as check_ids
from fedcl.models._tokenizer import check_tokenizer as check_tokenizer
from fedcl.models._tokenizer import fingerprint as fingerprint
from fedcl.models._tokenizer import tokenizer as tokenizer
from fedcl.models._trainable import adapters_only as adapters_only
from fedcl.models._trainable import any_of as any_of
from fedcl.models._trainable import biases_only as biases_only
from fedcl.models._trainable import everything as everything
from fedcl.models._trainable import head_only as head_only
from fedcl.models._trainable import ia3_only as ia3_only
from fedcl.models._trainable import lora_only as lora_only
from fedcl.models._trainable import norms_only as norms_only
from fedcl.models._trainable import prompts_only as prompts_only
from fedcl.models._vit import ViTConfig as ViTConfig
from fedcl.models._vit import image_encoder as image_encoder
from fedcl.models._vit import vit as vit
