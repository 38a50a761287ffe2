"""The lambda operation: the definition (`reference`), the exact orders (`eager`, `fused`), what they cost
(`strategies`), and the door (`lambda_op`)."""

from lambdanets.ops.lambda_op import lambda_op
from lambdanets.ops.planner import Plan, plan
from lambdanets.ops.problem import Cost, Problem
from lambdanets.ops.reference import lambda_reference, relative_embeddings
from lambdanets.ops.strategies import STRATEGIES, Strategy

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
