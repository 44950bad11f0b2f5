# jax_flashmla._cuda: the kernels, and the handlers that register them with XLA (C++, no nvcc).
find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG REQUIRED)
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
    "import importlib.util as u; print(u.find_spec('jaxlib').submodule_search_locations[0])"
  OUTPUT_VARIABLE jaxlib OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)

pybind11_add_module(_cuda NO_EXTRAS
  cuda/module.cc
  cuda/ffi/address_handler.cc
  cuda/ffi/append_handler.cc
  cuda/ffi/append_projected_handler.cc
  cuda/ffi/arguments.cc
  cuda/ffi/attention_handler.cc
  cuda/ffi/cache_arguments.cc
  cuda/ffi/decode_handler.cc
  cuda/ffi/exchange_arguments.cc
  cuda/ffi/exchange_handler.cc
  cuda/ffi/expectation.cc
  cuda/ffi/gather_handler.cc
  cuda/ffi/merge_handler.cc
  cuda/ffi/prepare_handler.cc
  cuda/ffi/queries_arguments.cc
  cuda/ffi/queries_handler.cc
  cuda/ffi/schedule_handler.cc)
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
