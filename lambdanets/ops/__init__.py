"""The lambda operation: the definition (`reference`), the exact orders (`eager`, `fused`), what they cost
(`strategies`), and the door (`lambda_op`)."""

from .lambda_op import lambda_op
from .reference import lambda_reference, relative_embeddings
from .strategies import STRATEGIES, Cost, Plan, Problem, Strategy, plan

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
