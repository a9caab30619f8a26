import torch
from helpers import gpt2, t5, tokens
from torch.utils.flop_counter import FlopCounterMode

from sqa_convert.speed.flops import training_flops


def test_training_flops_are_those_of_the_products_of_matrices():
    length, width, layers, vocabulary = 10, 48, 2, 61
    model = gpt2()
    linear = layers * 12 * width * width + width * vocabulary
    attention = layers * 2 * length * width
    assert training_flops(model, {"input_ids": tokens(1, length)}) == 3 * 2 * length * (linear + attention)


def test_an_encoder_decoder_is_counted_whole():
    model = t5()
    batch = {"input_ids": tokens(1, 9), "labels": tokens(1, 5)}
    plain = type(model)._from_config(model.config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(**batch, use_cache=False)
    assert training_flops(model, batch) == 3 * counter.get_total_flops() > 0
