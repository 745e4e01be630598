"""The inference engine: loads a model and serves token ids, text and logits from it. Imports torch."""
