# The extension module: kernels (CUDA, no XLA) and the handlers that register them (C++, no nvcc).
set(CMAKE_CUDA_COMPILER ${nvcc})
set(CMAKE_CUDA_ARCHITECTURES 90a-real)
cmake_path(GET nvcc PARENT_PATH cuda_root)
cmake_path(GET cuda_root PARENT_PATH cuda_root)
if(EXISTS ${cuda_root}/lib/libcudart_static.a)  # PyPI's layout: nvcc itself looks in lib64
  set(CMAKE_CUDA_FLAGS_INIT "-L${cuda_root}/lib")
  link_directories(${cuda_root}/lib)
endif()
enable_language(CXX)
enable_language(CUDA)

add_compile_options("$<$<COMPILE_LANGUAGE:CUDA>:-std=c++20>")  # CMake 3.25 knows no CUDA 20
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)

option(JAX_FLASHMLA_WERROR "Treat every compiler warning as an error" ON)
add_compile_options(
  "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra>"
  "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>")
if(JAX_FLASHMLA_WERROR)
  add_compile_options(
    "$<$<COMPILE_LANGUAGE:CXX>:-Werror>"
    "$<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings;-Xcompiler=-Werror;-Xptxas=-Werror>")
endif()

file(GLOB kernel_sources CONFIGURE_DEPENDS cuda/*.cu cuda/schedule/*.cu cuda/decode/*.cu cuda/combine/*.cu)
add_library(kernels OBJECT ${kernel_sources})
target_compile_options(kernels PRIVATE --resource-usage)
# ptxas tells of spills and serialised WGMMA as mere information: keep it, tests read it.
set_target_properties(kernels PROPERTIES
  CUDA_COMPILER_LAUNCHER ${CMAKE_CURRENT_SOURCE_DIR}/cmake/keep_ptxas_report.sh)

find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG REQUIRED)
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
    "import importlib.util as u; print(u.find_spec('jaxlib').submodule_search_locations[0])"
  OUTPUT_VARIABLE jaxlib OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)

pybind11_add_module(_cuda NO_EXTRAS
  cuda/module.cc
  cuda/ffi/arguments.cc
  cuda/ffi/decode_handler.cc
  cuda/ffi/prepare_handler.cc
  cuda/ffi/schedule_handler.cc)
target_compile_features(_cuda PRIVATE cxx_std_20)
target_compile_definitions(_cuda PRIVATE FLASHMLA_ARCH="sm_90a")
target_include_directories(_cuda SYSTEM PRIVATE
  ${jaxlib}/include ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_link_libraries(_cuda PRIVATE kernels)
target_link_options(_cuda PRIVATE -Wl,--exclude-libs,ALL)

add_custom_command(TARGET _cuda POST_BUILD
  COMMAND cat "$<JOIN:$<TARGET_OBJECTS:kernels>,.ptxas;>.ptxas" > ptxas.txt
  COMMAND_EXPAND_LISTS)
install(TARGETS _cuda LIBRARY DESTINATION jax_flashmla)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/ptxas.txt DESTINATION jax_flashmla RENAME _cuda.ptxas.txt)
