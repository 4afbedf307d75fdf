"""Real text for the real model: a chat, code, and prose."""

CHAT = """<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
<|im_start|>user
A baker sells 48 rolls in the morning and half as many in the afternoon. Each roll \
costs 3 dollars. How much money does she take in one day? Explain each step.<|im_end|>
<|im_start|>assistant
In the afternoon the baker sells half of 48 rolls, which is 24 rolls. Together"""

CODE = '''def merge(left, right):
    """Merges two sorted lists into one sorted list."""
    result = []
    i = j = 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            result.append(left[i])
            i += 1
        else:
            result.append(right[j])
            j += 1
    return result + left[i:] +'''

PROSE = "The lighthouse keeper wrote down the weather every evening, and"

PROMPTS = [CHAT, CODE, PROSE]
