#!/usr/bin/env bash
# Stands in for a program: prints its arguments, quoted for a shell.
printf '%q ' "$@"
