# Cross-compile the core for 64-bit ARM with Debian's g++-aarch64-linux-gnu, and run its tests under
# qemu-user (qemu-user-static):
#   cmake -B build/aarch64 --toolchain cmake/aarch64-linux-gnu.cmake -DZEROPOINT_PYTHON=OFF
#         -DZEROPOINT_CORE_TESTS=ON
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64-static -cpu max -L /usr/aarch64-linux-gnu)
