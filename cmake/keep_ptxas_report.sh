#!/bin/sh
# Runs the compiler command in its arguments; keeps what it says in <object>.ptxas and shows it
# only when the compilation fails.
set -u
object=
previous=
for argument in "$@"; do
  [ "$previous" = "-o" ] && object=$argument
  previous=$argument
done
[ -n "$object" ] || exec "$@"
"$@" >"$object.ptxas" 2>&1
status=$?
[ "$status" -eq 0 ] || cat "$object.ptxas" >&2
exit "$status"
