# Recipes source this file and call `launch ENTRY FLAGS ...`, which starts one process and ends none.
#
#   LAUNCH=python    (default) runs the entry, which starts and stops its own Ray
#   LAUNCH=ray-job   submits a job to the Ray cluster at RAY_ADDRESS; Ctrl-C stops that job
launch() {
   local entry="$1"
   shift
   local train=("${PYTHON:-python3}" "${REPO}/${entry}" "$@")
   case "${LAUNCH:-python}" in
      python)
         exec "${train[@]}"
         ;;
      ray-job)
         [[ -n "${RAY_ADDRESS:-}" ]] || {
            echo "LAUNCH=ray-job needs RAY_ADDRESS, for example http://127.0.0.1:8265" >&2
            exit 2
         }
         export RAY_ADDRESS
         job="vime-$(date +%Y%m%d-%H%M%S)-$$"
         trap 'ray job stop "${job}"' INT TERM
         ray job submit --submission-id "${job}" -- "${train[@]}"
         ;;
      *)
         echo "LAUNCH=${LAUNCH} is unknown. Use python or ray-job." >&2
         exit 2
         ;;
   esac
}
