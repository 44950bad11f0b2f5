# The oldest nvcc with everything the kernels use; sm_90a itself needs 12.0.
set(oldest_nvcc 12.4)

# Sets `nvcc` to the CUDA compiler's path and, where there is none, `missing` to the reason.
# In order: what the caller named (CMAKE_CUDA_COMPILER, CUDACXX); the PyPI compiler in the Python
# environment that builds; CUDA_HOME and CUDA_PATH; PATH.
function(find_nvcc nvcc missing)
  if(CMAKE_CUDA_COMPILER)
    set(found ${CMAKE_CUDA_COMPILER})
  elseif(DEFINED ENV{CUDACXX})
    set(found $ENV{CUDACXX})
  else()
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c
        "import importlib.util as u; s = u.find_spec('nvidia'); \
         print(*[p + '/cu13' for p in (s.submodule_search_locations if s else [])], sep=';')"
      OUTPUT_VARIABLE pypi_roots OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
    find_program(found nvcc HINTS ${pypi_roots} ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin
      NO_CACHE NO_CMAKE_SYSTEM_PATH)
  endif()

  if(NOT found)
    set(reason "no nvcc was found on PATH, in CUDA_HOME or in the Python environment")
  else()
    execute_process(COMMAND ${found} --version OUTPUT_VARIABLE banner RESULT_VARIABLE failed)
    if(failed OR NOT banner MATCHES "release ([0-9.]+)")
      set(reason "${found} does not run")
    elseif(CMAKE_MATCH_1 VERSION_LESS oldest_nvcc)
      set(reason "${found} is ${CMAKE_MATCH_1}, older than ${oldest_nvcc}")
    endif()
  endif()
  set(${nvcc} ${found} PARENT_SCOPE)
  set(${missing} ${reason} PARENT_SCOPE)
endfunction()
