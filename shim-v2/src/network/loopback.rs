//! Takes the connections to the loopback addresses of a Pod's namespace on the host, whatever their port.
//!
//! Nobody listens there, as the Pod's programs are in the guest. One socket for each family listens, and a program of
//! eBPF (`sk_lookup`, Linux 5.9) hands it every connection to its loopback addresses; the accepted socket's own address
//! tells which was wanted. All of it goes with what is in [`Loopback`]. Must not know who carries the connections on.

use rustix::net::{
    AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt::set_ipv6_v6only,
};
use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::{AsFd, OwnedFd},
};
use walnut_bpf::{
    Assembler, CONTEXT, RESULT, STACK, code,
    function::{ASSIGN_SOCKET, MAP_LOOKUP, RELEASE_SOCKET},
    kernel::{self, Map, MapKind, MapShape, ProgramKind, attach_to_network},
};

/// Connections that wait to be accepted, for each family.
const BACKLOG: i32 = 128;

/// Fields of the kernel's `struct bpf_sk_lookup`.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;
/// `SK_PASS`: go on, with the socket that was assigned or as if there were no program.
const PASS: i32 = 1;

const AF_INET: i32 = 2;
const IPPROTO_TCP: i32 = 6;

/// A register that helpers leave alone, and the socket's.
const ASKED: u8 = 6;
const SOCKET: u8 = 7;
const SCRATCH: u8 = 2;
/// Where the stack holds the index of a socket.
const INDEX: i16 = -4;

/// What listens, and what makes everybody find it.
#[derive(Debug)]
pub(crate) struct Loopback {
    /// Sockets that don't block; one, where the host has no IPv6.
    pub(crate) listeners: Vec<TcpListener>,
    /// While it is open the kernel asks the program.
    pub(crate) link: OwnedFd,
}

impl Loopback {
    /// Takes the connections of a namespace, on a thread that has entered it.
    pub(super) fn take(namespace: &impl AsFd) -> io::Result<Self> {
        let families = [
            SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            SocketAddr::from((Ipv6Addr::LOCALHOST, 0)),
        ];
        let sockets = Map::create(MapShape {
            kind: MapKind::Sockets,
            key: 4,
            value: 8,
            entries: 2,
            flags: 0,
        })?;
        let mut listeners = Vec::with_capacity(families.len());
        for (index, address) in (0..).zip(families) {
            let listener = match listener(address) {
                Err(error) if address.is_ipv6() && is_without_ipv6(&error) => continue,
                listener => listener?,
            };
            sockets.put_socket(index, &listener)?;
            listeners.push(listener);
        }
        let program = kernel::load(
            ProgramKind::SocketLookup,
            "walnut_loopback",
            &program(sockets.descriptor()),
        )?;
        Ok(Self {
            listeners,
            link: attach_to_network(namespace, &program)?,
        })
    }
}

/// The port is anyone's choice: the program finds the socket by its index.
fn listener(address: SocketAddr) -> io::Result<TcpListener> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    if address.is_ipv6() {
        set_ipv6_v6only(&socket, true)?;
    }
    bind(&socket, &address)?;
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// The kernel, or this namespace by `disable_ipv6`.
fn is_without_ipv6(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)
    )
}

/// Assigns the first socket of a map to connections to 127.0.0.0/8, the second to those to `::1`.
fn program(sockets: i32) -> Vec<u64> {
    let mut program = Assembler::default();
    program
        .add(code::MOVE_REGISTER, ASKED, CONTEXT, 0, 0)
        .add(code::LOAD_WORD, SCRATCH, ASKED, PROTOCOL, 0)
        .jump(code::JUMP_NOT_EQUAL, SCRATCH, 0, IPPROTO_TCP, "pass")
        .add(code::LOAD_WORD, SCRATCH, ASKED, FAMILY, 0)
        .jump(code::JUMP_NOT_EQUAL, SCRATCH, 0, AF_INET, "ipv6")
        // Addresses are in the order of the network: the first byte is the lowest.
        .add(code::LOAD_WORD, SCRATCH, ASKED, LOCAL_IP4, 0)
        .add(code::AND, SCRATCH, 0, 0, 0xff)
        .jump(code::JUMP_NOT_EQUAL, SCRATCH, 0, 127, "pass")
        .add(code::STORE_WORD_IMMEDIATE, STACK, 0, INDEX, 0)
        .jump(code::JUMP, 0, 0, 0, "look up")
        .place("ipv6");
    for (part, expected) in [(0, 0), (4, 0), (8, 0), (12, 1_i32.to_be())] {
        program
            .add(code::LOAD_WORD, SCRATCH, ASKED, LOCAL_IP6 + part, 0)
            .jump(code::JUMP_NOT_EQUAL, SCRATCH, 0, expected, "pass");
    }
    program
        .add(code::STORE_WORD_IMMEDIATE, STACK, 0, INDEX, 1)
        .place("look up")
        .map(CONTEXT, sockets)
        .stack(SCRATCH, INDEX.into())
        .call(MAP_LOOKUP)
        .jump(code::JUMP_EQUAL, RESULT, 0, 0, "pass")
        .add(code::MOVE_REGISTER, SOCKET, RESULT, 0, 0)
        .add(code::MOVE_REGISTER, CONTEXT, ASKED, 0, 0)
        .add(code::MOVE_REGISTER, 2, SOCKET, 0, 0)
        .add(code::MOVE, 3, 0, 0, 0)
        .call(ASSIGN_SOCKET)
        .add(code::MOVE_REGISTER, CONTEXT, SOCKET, 0, 0)
        .call(RELEASE_SOCKET)
        .place("pass")
        .add(code::MOVE, RESULT, 0, 0, PASS)
        .add(code::EXIT, 0, 0, 0, 0);
    program.finish()
}

#[cfg(test)]
mod tests {
    use super::super::{NetworkError, namespace::Namespace};
    use super::*;
    use std::{
        io::{Read as _, Write as _},
        net::{Shutdown, TcpStream},
        path::Path,
        process::{Child, Command, Stdio},
    };

    /// A process that holds a namespace in which a script has run; it ends with its input.
    fn holder(script: &str) -> Option<Child> {
        let script = format!("{script} && echo ready && exec cat");
        let mut holder = Command::new("unshare")
            .args(["--net", "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        let mut ready = [0; 6];
        let said = holder.stdout.as_mut()?.read_exact(&mut ready);
        said.is_ok().then_some(holder)
    }

    /// Works in a namespace whose connections are taken; needs root, without which it says so.
    fn in_a_namespace(script: &str, work: impl FnOnce(Loopback) -> io::Result<()> + Send) {
        let Some(mut holder) = holder(script) else {
            return eprintln!("skipped: no network namespace can be made here");
        };
        let path = format!("/proc/{}/ns/net", holder.id());
        let namespace = Namespace::open(Path::new(&path)).unwrap();
        let failed = |source| NetworkError::Operation {
            what: "the test in",
            interface: path.clone(),
            source,
        };
        let done = namespace.run(|| match Loopback::take(namespace.file()) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                eprintln!("skipped: no program can be loaded here");
                Ok(())
            }
            taken => taken.and_then(work).map_err(failed),
        });
        done.unwrap();
        drop(holder.stdin.take());
        holder.wait().unwrap();
    }

    fn said(mut stream: TcpStream) -> io::Result<String> {
        let mut said = String::new();
        stream.read_to_string(&mut said).map(|_| said)
    }

    fn refused(address: &str) -> io::ErrorKind {
        TcpStream::connect(address).unwrap_err().kind()
    }

    #[test]
    fn every_port_of_loopback_is_taken_and_told_apart() {
        let script = "ip link set lo up && ip address add 192.0.2.1/32 dev lo";
        in_a_namespace(script, |loopback| {
            for (index, address) in [
                (0, "127.0.0.1:80"),
                (0, "127.1.2.3:65535"),
                (1, "[::1]:8080"),
            ] {
                let address: SocketAddr = address.parse().unwrap();
                let mut client = TcpStream::connect(address)?;
                let listener = &loopback.listeners[index];
                listener.set_nonblocking(false)?;
                let (mut taken, peer) = listener.accept()?;
                assert_eq!(taken.local_addr()?, address);
                assert_eq!(peer, client.local_addr()?);
                client.write_all(b"asked")?;
                client.shutdown(Shutdown::Write)?;
                taken.write_all(b"answered")?;
                assert_eq!(said(taken)?, "asked");
                assert_eq!(said(client)?, "answered");
            }
            // An address that isn't loopback's has what it had, and afterwards all have.
            assert_eq!(refused("192.0.2.1:80"), io::ErrorKind::ConnectionRefused);
            drop(loopback);
            assert_eq!(refused("127.0.0.1:80"), io::ErrorKind::ConnectionRefused);
            Ok(())
        });
    }

    #[test]
    fn a_namespace_without_ipv6_has_the_other_family() {
        let script = "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6 && ip link set lo up";
        in_a_namespace(script, |loopback| {
            assert_eq!(loopback.listeners.len(), 1);
            TcpStream::connect("127.0.0.1:80").map(drop)
        });
    }
}
