# Completion of `python -m lcbench.sweep`: Hydra knows the answers, but its own function knows scripts and not modules.
_lcbench_sweep() {
    if [ "${COMP_WORDS[1]} ${COMP_WORDS[2]}" != "-m lcbench.sweep" ]; then
        [ -n "$_LCBENCH_BEFORE" ] && "$_LCBENCH_BEFORE" "$@"
        return
    fi
    local line="lcbench.sweep${COMP_LINE#*lcbench.sweep}"
    COMPREPLY=($(compgen -W "$(COMP_LINE="$line" "${COMP_WORDS[0]}" -m lcbench.sweep -sc query=bash 2>/dev/null)" -- "${COMP_WORDS[COMP_CWORD]}"))
}
_LCBENCH_BEFORE=$(complete -p python 2>/dev/null | sed -n 's/.*-F \([^ ]*\).*/\1/p')
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _lcbench_sweep python python3
