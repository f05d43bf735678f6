"""Everything that touches a model: loading, answers, saliency, the LM head."""
