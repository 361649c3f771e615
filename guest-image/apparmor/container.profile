# What containerd (cri-containerd.apparmor.d) and Docker (docker-default) have their hosts' AppArmor hold containers
# to, for the guest's. Everything is allowed that is not denied below or by other means; @NAME@ is the profile's name.
# An abi makes later kernels mediate no more than this text knows of.
abi <abi/3.0>,

profile @NAME@ flags=(attach_disconnected,mediate_deleted) {
  network,
  capability,
  file,
  umount,

  # The agent, which nothing confines, signals containers; they signal and trace their own.
  signal (receive) peer=unconfined,
  signal (send,receive) peer=@NAME@,
  ptrace (trace,read,tracedby,readby) peer=@NAME@,

  deny mount,

  # Of /proc: processes' own files may be written, and of /proc/sys what is shared memory's.
  deny /proc/* w,
  deny /proc/{[^1-9/],[^1-9/][^0-9/],[^1-9s/][^0-9y/][^0-9s/],[^1-9/][^0-9/][^0-9/][^0-9/]*}/** w,
  deny /proc/sys/[^k]** w,
  deny /proc/sys/kernel/{?,??,[^s][^h][^m]**} w,
  deny /proc/{sysrq-trigger,kcore} rwklx,

  # Of /sys: cgroups alone.
  deny /sys/[^f]*/** wklx,
  deny /sys/f[^s]*/** wklx,
  deny /sys/fs/[^c]*/** wklx,
  deny /sys/fs/c[^g]*/** wklx,
  deny /sys/fs/cg[^r]*/** wklx,
  deny /sys/{firmware,kernel/security,devices/virtual/powercap}/** rwklx,
}
