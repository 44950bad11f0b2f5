# The CUDA compiler, the flags that hold for everything, and the kernels behind cuda/launch.h.
set(CMAKE_CUDA_COMPILER ${nvcc})
set(CMAKE_CUDA_ARCHITECTURES 90a-real)
cmake_path(GET nvcc PARENT_PATH cuda_bin)
cmake_path(GET cuda_bin PARENT_PATH cuda_root)
if(EXISTS ${cuda_root}/lib/libcudart_static.a)  # PyPI's layout: nvcc itself looks in lib64
  set(CMAKE_CUDA_FLAGS_INIT "-L${cuda_root}/lib")
  link_directories(${cuda_root}/lib)
endif()
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
enable_language(CXX)
enable_language(CUDA)

set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)

option(JAX_FLASHMLA_WERROR "Treat every compiler warning as an error" ON)
add_compile_options(
  "$<$<COMPILE_LANGUAGE:CXX>:-std=c++20;-Wall;-Wextra>"
  "$<$<COMPILE_LANGUAGE:CUDA>:-std=c++20;-Xcompiler=-Wall,-Wextra>")
if(JAX_FLASHMLA_WERROR)
  add_compile_options(
    "$<$<COMPILE_LANGUAGE:CXX>:-Werror>"
    "$<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings;-Xcompiler=-Werror;-Xptxas=-Werror>")
endif()

option(JAX_FLASHMLA_DEBUG "Kernels with bounded waits that name a stuck barrier, and random delays" OFF)
option(JAX_FLASHMLA_DELAYS "Kernels with random delays, otherwise as released" OFF)
foreach(check DEBUG DELAYS)
  if(JAX_FLASHMLA_${check})
    add_compile_definitions(FLASHMLA_${check})
  endif()
endforeach()

file(GLOB kernel_sources CONFIGURE_DEPENDS
  cuda/schedule/*.cu cuda/decode/*.cu cuda/decode_few/*.cu cuda/combine/*.cu cuda/cache/*.cu
  cuda/merge/*.cu cuda/exchange/*.cu cuda/queries/*.cu)
add_library(kernels OBJECT ${kernel_sources})
target_compile_options(kernels PRIVATE --resource-usage)
# ptxas tells of spills and serialised WGMMA as mere information: keep it, tests read it.
set_target_properties(kernels PROPERTIES
  CUDA_COMPILER_LAUNCHER ${CMAKE_CURRENT_SOURCE_DIR}/cmake/keep_ptxas_report.sh)
