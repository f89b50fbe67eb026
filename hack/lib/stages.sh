# Stages that overlap: each begins when those that it needs are done, says how long it should take, and ends all others
# where it fails. What a stage took here without caches is kept for the next time; before that a table stands in,
# stretched as the stages that are known here are.
# shellcheck shell=bash

TIMES=$CACHE/stage-times # lines of: NAME SECONDS
CACHED_S=3               # what a stage takes about that finds its work done
LITTLE_MEMORY_KB=6000000 # with less available one stage runs at a time: a linker takes 2 GB
STAGES=()
declare -A LABEL=() NEEDS=() TABLE=() EXPECTED=() IS_CACHED=() STATE_OF=() PID_OF=() BEGAN=()

# NAME SECONDS NEEDED LABEL: declare a stage that runs the function stage_NAME once those NEEDED (names) are done, and
# takes so long on two cores. Where the function cached_NAME succeeds its work is done already, or nearly.
stage() {
  STAGES+=("$1")
  TABLE[$1]=$2 NEEDS[$1]=$3 LABEL[$1]=$4 STATE_OF[$1]=waiting
}

measured() { [ ! -f "$TIMES" ] || awk -v name="$1" '$1 == name {print $2}' "$TIMES"; } # NAME

remember() { # NAME SECONDS
  mkdir -p "$CACHE"
  {
    ! [ -f "$TIMES" ] || grep -v "^$1 " "$TIMES" || true
    echo "$1 $2"
  } >"$TIMES.$$"
  mv "$TIMES.$$" "$TIMES"
}

clock() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); } # SECONDS

# Fill EXPECTED for every stage.
expect() {
  local name seconds known=0 table=0
  for name in "${STAGES[@]}"; do
    seconds=$(measured "$name")
    [ -z "$seconds" ] || known=$((known + seconds)) table=$((table + TABLE[$name]))
  done
  for name in "${STAGES[@]}"; do
    seconds=$(measured "$name")
    if declare -F "cached_$name" >/dev/null && "cached_$name"; then
      EXPECTED[$name]=$CACHED_S IS_CACHED[$name]=yes
    elif [ -n "$seconds" ]; then
      EXPECTED[$name]=$seconds
    else
      EXPECTED[$name]=$((table > 0 ? TABLE[$name] * known / table : TABLE[$name]))
    fi
  done
}

# Print the seconds until the last stage is done: the longest way through those that are left.
remaining() {
  local name needed left last=0
  local -A ends=()
  for name in "${STAGES[@]}"; do # declared after what they need
    ends[$name]=0
    case "${STATE_OF[$name]}" in
      ended) continue ;;
      running)
        left=$((EXPECTED[$name] - SECONDS + BEGAN[$name]))
        left=$((left > 2 ? left : 2))
        ;;
      *)
        left=${EXPECTED[$name]}
        for needed in ${NEEDS[$name]}; do
          [ "${ends[$needed]}" -le "${ends[$name]}" ] || ends[$name]=${ends[$needed]}
        done
        ;;
    esac
    ends[$name]=$((ends[$name] + left))
    [ "${ends[$name]}" -le "$last" ] || last=${ends[$name]}
  done
  echo "$last"
}

log_of_stage() { echo "$CACHE/log/stage-$1.log"; }

begin_stage() { # NAME
  mkdir -p "$CACHE/log"
  BEGAN[$1]=$SECONDS STATE_OF[$1]=running
  set -m # a process group of its own: Ctrl-C reaches us alone, and all of it ends with us
  "stage_$1" >"$(log_of_stage "$1")" 2>&1 </dev/null &
  PID_OF[$1]=$!
  set +m
}

end_stages() { # what still runs, with all that it started
  local name tries
  trap '' INT TERM HUP
  for name in "${!PID_OF[@]}"; do kill -- "-${PID_OF[$name]}" 2>/dev/null || true; done
  for name in "${!PID_OF[@]}"; do
    for ((tries = 0; tries < 300; tries++)); do # taking down a cluster that was about to start takes its time
      kill -0 -- "-${PID_OF[$name]}" 2>/dev/null || break
      sleep .1
    done
    kill -9 -- "-${PID_OF[$name]}" 2>/dev/null || true
  done
}

may_begin() { # NAME
  local needed
  [ "${STATE_OF[$1]}" = waiting ] || return 1
  for needed in ${NEEDS[$1]}; do
    [ "${STATE_OF[$needed]}" = ended ] || return 1
  done
}

finish_stage() { # NAME: its process has ended
  local status=0 took=$((SECONDS - BEGAN[$1]))
  wait "${PID_OF[$1]}" || status=$?
  unset "PID_OF[$1]"
  if [ "$status" != 0 ]; then
    say "$(clock $SECONDS)  FAILED after $(clock $took): ${LABEL[$1]}; the end of $(log_of_stage "$1"):"
    tail -n 20 "$(log_of_stage "$1")" | sed 's/^/    /' >&2
    exit "$status"
  fi
  STATE_OF[$1]=ended
  [ -n "${IS_CACHED[$1]:-}" ] || remember "$1" "$took"
  say "$(clock $SECONDS)  done in $(clock $took): ${LABEL[$1]}"
}

run_stages() {
  local name running seconds most=4 next=15 left=${#STAGES[@]}
  [ "$(awk '$1 == "MemAvailable:" {print $2}' /proc/meminfo)" -ge "$LITTLE_MEMORY_KB" ] || most=1
  expect
  for name in "${STAGES[@]}"; do
    seconds=$(clock "${EXPECTED[$name]}")
    say "$(printf '  %-60s %s' "${LABEL[$name]}" "${IS_CACHED[$name]:+cached, }$seconds")"
  done
  say "about $(clock "$(remaining)") in all, what can overlap does; logs are $(log_of_stage '*')"
  trap end_stages EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM HUP
  SECONDS=0
  while [ "$left" -gt 0 ]; do
    running=
    for name in "${STAGES[@]}"; do
      if [ "${#PID_OF[@]}" -lt "$most" ] && may_begin "$name"; then begin_stage "$name"; fi
      [ "${STATE_OF[$name]}" = running ] || continue
      if kill -0 "${PID_OF[$name]}" 2>/dev/null; then
        running+=", ${LABEL[$name]%%:*} $(clock $((SECONDS - BEGAN[$name]))) of $(clock "${EXPECTED[$name]}")"
      else
        finish_stage "$name"
        left=$((left - 1))
      fi
    done
    if ((SECONDS >= next)); then
      say "$(clock $SECONDS)  running: ${running#, }; about $(clock "$(remaining)") left"
      next=$((SECONDS + 15))
    fi
    sleep .2
  done
  trap - EXIT INT TERM HUP
}
