"""The calculator's own process: `python -I -S tool_process.py CPU_SECONDS MEMORY_BYTES`.

It reads one expression from each line and answers with one JSON line. It imports nothing from vime.
It evaluates only numbers and operators of the syntax tree, so names, calls and attributes are
errors.
"""

import ast
import json
import operator
import resource
import sys

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def value(node: ast.AST) -> int | float:
    if isinstance(node, ast.Expression):
        return value(node.body)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value(node.left), value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value(node.operand))
    raise ValueError(f"{type(node).__name__} is not arithmetic")


def answer(expression: str) -> dict:
    try:
        result = value(ast.parse(expression.strip(), mode="eval"))
        return {"result": str(result)}
    except Exception as error:  # a model may write anything
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    cpu_s, memory = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))  # it may not open a file or a socket
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + cpu_s + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
