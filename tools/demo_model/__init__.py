"""Makes the demo model: pictures with prompts, training, scores, the shipped folder. See docs/demo-model.md."""
