"Tiny models of other families, with random weights."

import torch


def tiny(family):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if family == "gpt2":
        sizes = GPT2Config(n_layer=3, n_head=4, n_embd=48, vocab_size=60, n_positions=32)
        return GPT2LMHeadModel(sizes).eval()
    sizes = LlamaConfig(
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=48,
        intermediate_size=80,
        vocab_size=60,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(sizes).eval()
