# flashmla_runner: the decode step without XLA and without Python, for checks and sanitizers.
file(GLOB runner_sources CONFIGURE_DEPENDS cuda/runner/*.cc cuda/runner/*.cu)
add_executable(flashmla_runner ${runner_sources})
target_include_directories(flashmla_runner SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_link_libraries(flashmla_runner PRIVATE kernels)

# flashmla_probes: the building blocks of the kernels one by one on the GPU.
file(GLOB probe_sources CONFIGURE_DEPENDS cuda/probes/*.cc cuda/probes/*.cu)
add_executable(flashmla_probes
  ${probe_sources} cuda/runner/problem.cc cuda/schedule/kernel.cu)
target_include_directories(flashmla_probes SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})

# libflashmla_kernels.so, a build of the kernels, and flashmla_compare, which times several in turns.
add_library(flashmla_kernels SHARED cuda/compare/library.cc cuda/runner/replay.cc)
target_include_directories(flashmla_kernels SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_link_libraries(flashmla_kernels PRIVATE kernels)
target_link_options(flashmla_kernels PRIVATE -Wl,--exclude-libs,ALL)
add_executable(flashmla_compare cuda/compare/compare.cu
  cuda/runner/options.cc cuda/runner/problem.cc cuda/runner/replay.cc cuda/runner/workload.cc)
target_include_directories(flashmla_compare SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_link_libraries(flashmla_compare PRIVATE ${CMAKE_DL_LIBS})
