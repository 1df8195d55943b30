"""Starts the project's own side; apart, so that worker processes import only what they need.

python benchmarks/peers/own_side.py < requests.jsonl
"""

if __name__ == "__main__":
    from own_stages import STAGES
    from serve import serve

    serve(STAGES)
