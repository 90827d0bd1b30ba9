# What the launch scripts do alike; they read this file, and it does nothing by itself.
# shellcheck shell=bash

exec 3>&1 # what a dry run would do is shown here, also from inside $(...)
dry_run=false
me=$(basename "$0")

# Says what happens, beside the log of the run.
say() { printf '%s: %s\n' "$me" "$*" >&2; }

# Ends with the usage: what is wrong is the command, and it is of no use to try it again.
wrong() {
    say "$*"
    usage >&2
    exit 2
}

# Shows a command as it could be typed.
show() {
    local words
    printf -v words ' %q' "$@"
    printf '+%s\n' "$words" >&3
}

# Runs a command, or shows it in a dry run.
act() { if "$dry_run"; then show "$@"; else "$@"; fi; }

# Checks the value of a flag: needs FLAG COUNT VALUE..., with the words from the flag on.
needs() {
    if (($2 < 2)) || [[ $3 == --* ]]; then wrong "$1 needs a value"; fi
}

# Checks a whole number.
number() { if ! [[ $2 =~ ^[0-9]{1,9}$ ]] || ((10#$2 < $3)); then wrong "$1 must be a number of at least $3, got '$2'"; fi; }

# Checks a name as clouds take it; it also becomes part of paths.
cloud_name() {
    if ! [[ $2 =~ ^[a-z]([-a-z0-9]{0,48}[a-z0-9])?$ ]]; then
        wrong "$1 must be lower-case letters, digits and dashes, got '$2'"
    fi
}

# Waits for a child through the signals that this shell takes, and leaves its status in $ended.
ended=0
wait_for() {
    while :; do
        ended=0
        wait "$1" || ended=$?
        if ((ended <= 128)) || ! kill -0 "$1" 2>/dev/null; then return 0; fi
    done
}
