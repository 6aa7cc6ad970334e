"The small pretrained models of other generations that lie in the package."

SIBLINGS = ["qwen1", "qwen2", "qwen3_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp"]
