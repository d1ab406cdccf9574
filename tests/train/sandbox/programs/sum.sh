s=0; while read -r x; do s=$((s + x)); done; echo "$s"; echo x >&2
