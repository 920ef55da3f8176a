# Sourced first by every script. --help prints the comment at the head of the script that was
# called; behind a -- it is no longer the script's own.
stop() { echo "$(basename "$0"): error: $1" >&2; exit 2; }

for word; do
    case $word in
        --) break ;;
        --help | -h) sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0"; exit ;;
    esac
done
unset word
case $(basename "$0") in
    usage.sh | runs.sh | grid.sh | environment.sh)
        stop "the other scripts source it; start one of them (bash scripts/quickstart.sh --help)" ;;
esac
