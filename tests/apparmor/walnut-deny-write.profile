# A profile of a node's own, for tests. `walnut-deny-write` beside it is what
#     apparmor_parser --skip-kernel-load --skip-cache --config-file /dev/null \
#         --kernel-features guest-image/apparmor/features --ofile tests/apparmor/walnut-deny-write FILE
# makes of it.
abi <abi/3.0>,

profile walnut-deny-write flags=(attach_disconnected,mediate_deleted) {
  network,
  capability,
  file,
  umount,
  signal,
  ptrace,
  deny /tmp/kept w,
}
