"""Language models and expert vectors: pretraining, distillation into a hybrid, expert training, measurement, cards.

Commands: `pretrain`, `distill`, `measure_hybrid`, `evaluate`, `train_expert`, `sweep_experts`.
"""
