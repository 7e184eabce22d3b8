"""Experiments: mask -> outputs. The only place where ablation and its siblings differ."""
