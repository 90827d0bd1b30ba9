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

# What a script takes beside --dry-run and --help, each into the variable of its name: flags with a text, with a number
# from 1 on, with one from 0 on, and without a value. What follows -- is for the training, in `flags`.
texts="" counts="" numbers="" switches="" flags=()

# Takes a flag of any other form; fails if there is none.
own_flag() { return 1; }

# Reads what a script is given: read_flags ARGUMENT...
read_flags() {
    local variable least
    while (($#)); do
        variable=${1#--}
        variable=${variable//-/_}
        case $1 in
            --)
                # shellcheck disable=SC2034 # the script uses them
                flags=("${@:2}")
                return
                ;;
            -h | --help)
                usage
                exit 0
                ;;
        esac
        if among "$1" "--dry-run $switches"; then
            printf -v "$variable" true
        elif among "$1" "$texts $counts $numbers"; then
            if (($# < 2)) || [[ $2 == --* ]]; then wrong "$1 needs a value"; fi
            if among "$1" "$texts"; then
                printf -v "$variable" %s "$2"
            else
                least=0
                if among "$1" "$counts"; then least=1; fi
                number "$1" "$2" "$least"
                printf -v "$variable" %s "$((10#$2))"
            fi
            shift
        elif ! own_flag "$1"; then
            wrong "unknown argument '$1' (the flags of the training come after --)"
        fi
        shift
    done
}

# Tells whether a word is one of a list.
among() { [[ $1 =~ ^--[-a-z]+$ && " $2 " == *" $1 "* ]]; }

# Checks that flags have a value: required NAME...
required() {
    while (($#)); do # with no variable of its own, which could be one of those
        if [[ -z ${!1} ]]; then wrong "--$1 is missing"; fi
        shift
    done
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
