import sys

print(sum(map(int, sys.stdin)))
print("x", file=sys.stderr)
