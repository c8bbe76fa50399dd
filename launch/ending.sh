# Sourced by the scripts that start training: how a start ends, which status.json says and no launcher does.
# shellcheck shell=bash

ending_status=
ending_before=

# Every write of the status is a new file: its number and time tell one start from another.
which_status() { stat -c '%i %y' "$ending_status" 2>/dev/null || true; }

# note_status RUN_FOLDER: before a start. What an earlier one has left behind says nothing about this one.
note_status() {
    ending_status=$1/status.json
    ending_before=$(which_status)
}

# wait_for PID: sets `code`. A signal ends `wait` too, once its trap has run; then it is waited for again.
wait_for() {
    while true; do
        code=0
        wait "$1" || code=$?
        kill -0 "$1" 2>/dev/null || break
    done
}

# status_says NAME: a value of status.json (state, step); nothing where there is no such file.
status_says() { sed -n "s/^ *\"$1\": \"\{0,1\}\([a-z0-9]*\)\"\{0,1\},\{0,1\}$/\1/p" "$ending_status" 2>/dev/null || true; }

# state_of_this_start CODE: what became of the run; nothing, if this start has not written it. CODE is what the launcher
# ended with. Where that is 0 and the status still says `running`, a shared file system is late, and is given a minute.
state_of_this_start() {
    local moments=60
    while [[ $1 == 0 && $(status_says state) == running ]] && ((moments--)); do
        sleep 1
    done
    [[ $(which_status) == "$ending_before" ]] || status_says state
}

# exit_code_of CODE STATE: 0 (finished, or stopped with a checkpoint), 2 (refused) or 70 (failed).
exit_code_of() {
    case $1:$2 in
        0:* | 2:*) echo "$1" ;;
        *:finished | *:stopped | *:preempted) echo 0 ;;
        *) echo 70 ;;
    esac
}
