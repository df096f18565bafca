# Completion of `python -m lcbench.sweep` and `lcbench sweep`: Hydra knows the answers, but its own function knows scripts only.
# Of `lcbench` the commands are completed too.
# Answers and names of files are data: they are compared and quoted, and never expanded. Names with control characters are left out.
_lcbench_sweep() {
    local -a sweep
    local typed
    if [ "${COMP_WORDS[1]} ${COMP_WORDS[2]}" = "-m lcbench.sweep" ]; then
        sweep=("${COMP_WORDS[0]}" -m lcbench.sweep) typed=${COMP_LINE#*lcbench.sweep}
    elif [ "${COMP_WORDS[0]##*/}" = lcbench ]; then
        COMPREPLY=()
        if [ "$COMP_CWORD" = 1 ]; then
            mapfile -t COMPREPLY < <(compgen -W "$("${COMP_WORDS[0]}" --help 2>/dev/null | sed -n 's/^  \([a-z]*\) .*/\1/p')" -- "${COMP_WORDS[1]}")
            COMPREPLY=("${COMPREPLY[@]/%/ }")
            return
        fi
        [ "${COMP_WORDS[1]}" = sweep ] || return
        sweep=("${COMP_WORDS[0]}" sweep) typed=${COMP_LINE#*lcbench} typed=${typed#*sweep}
    else
        [ -n "$_LCBENCH_BEFORE" ] && "$_LCBENCH_BEFORE" "$@"
        return
    fi
    COMPREPLY=()
    local _LCBENCH_TYPED IFS=$' \t\n' candidate
    local -a candidates
    _lcbench_unquote "${COMP_WORDS[COMP_CWORD]}" || return  # inside of quotes readline completes names of files by itself
    local key=${_LCBENCH_TYPED%"${_LCBENCH_TYPED##*[=,]}"} value=${_LCBENCH_TYPED##*[=,]}
    if [ -n "$key" ] && [[ $value == [./~]* ]]; then
        [[ $value == "~/"* ]] && value=$HOME/${value:2}
        for candidate in "$value"*; do
            [ -d "$candidate" ] && candidate+=/
            [ -e "$candidate" ] && candidates+=("$key$candidate")
        done
        _LCBENCH_TYPED=$key$value
    else
        read -r -d '' -a candidates < <(COMP_LINE="lcbench.sweep$typed" "${sweep[@]}" -sc query=bash 2>/dev/null)
    fi
    for candidate in "${candidates[@]}"; do
        if [[ $candidate == "$_LCBENCH_TYPED"* && $candidate != *[[:cntrl:]]* ]]; then
            printf -v candidate %q "$candidate"
            COMPREPLY+=("$candidate")
        fi
    done
}
# The word that a piece of a command line stands for, in _LCBENCH_TYPED; fails where a quote is still open.
_lcbench_unquote() {
    local text=$1 quote= character
    _LCBENCH_TYPED=
    while [ -n "$text" ]; do
        character=${text:0:1} text=${text:1}
        if [ "$character" = "$quote" ]; then
            quote=
        elif [ "$character" = "\\" ] && [ "$quote" != "'" ]; then
            _LCBENCH_TYPED+=${text:0:1} text=${text:1}
        elif [ -z "$quote" ] && [[ $character == [\'\"] ]]; then
            quote=$character
        else
            _LCBENCH_TYPED+=$character
        fi
    done
    [ -z "$quote" ]
}
_LCBENCH_FOUND=$(complete -p python 2>/dev/null | sed -n 's/.*-F \([^ ]*\).*/\1/p')
[ "$_LCBENCH_FOUND" = _lcbench_sweep ] || _LCBENCH_BEFORE=$_LCBENCH_FOUND
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _lcbench_sweep python python3 lcbench
