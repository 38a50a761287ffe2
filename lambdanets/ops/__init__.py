"""The lambda operation: the definition (`reference`), the exact orders (`eager`), and the door (`lambda_op`)."""

from .lambda_op import STRATEGIES, Cost, Plan, Problem, Strategy, lambda_op, plan
from .reference import lambda_reference, relative_embeddings

__all__ = [
    "STRATEGIES",
    "Cost",
    "Plan",
    "Problem",
    "Strategy",
    "lambda_op",
    "lambda_reference",
    "plan",
    "relative_embeddings",
]
