# The oldest nvcc that knows what the kernels use.
set(oldest_nvcc 12.4)

option(JAX_FLASHMLA_PYPI_CUDA "Use the CUDA compiler that PyPI packages put into the building Python" OFF)

# Sets `nvcc` to the CUDA compiler's path or, where there is none, `missing` to the reason.
function(find_nvcc nvcc missing)
  if(JAX_FLASHMLA_PYPI_CUDA)
    set(places "the building Python's nvidia/cu13/bin")
    find_package(Python 3.11 REQUIRED COMPONENTS Interpreter)
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c
        "import importlib.util as u; s = u.find_spec('nvidia'); \
         print(*[p + '/cu13/bin' for p in (s.submodule_search_locations if s else [])], sep=';')"
      OUTPUT_VARIABLE directories OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
    find_program(found nvcc PATHS ${directories} NO_DEFAULT_PATH NO_CACHE)
  elseif(CMAKE_CUDA_COMPILER)
    set(found ${CMAKE_CUDA_COMPILER})
  elseif(DEFINED ENV{CUDACXX})
    set(found $ENV{CUDACXX})
  else()
    set(places "PATH, CUDA_HOME or CUDA_PATH")
    find_program(found nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin
      NO_CACHE NO_CMAKE_SYSTEM_PATH)
  endif()

  if(NOT found)
    set(reason "there is no nvcc in ${places}")
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
