//! What CNI plugins make, when they make it, and what is refused or undone.

use super::*;

/// A CNI plugin of Debian's, as a runtime calls it.
fn cni(command: &str, netns: &str) -> Result<String> {
    let list = r#"
        bridge='{"cniVersion":"1.0.0","name":"wtcni","type":"bridge","bridge":"wtbr","isGateway":true,"ipMasq":false,
            "ipam":{"type":"host-local","dataDir":"/run/wtcni","ranges":[[{"subnet":"10.90.0.0/24"}],[{"subnet":"fd90::/64"}]],
            "routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}}'
        portmap='{"cniVersion":"1.0.0","name":"wtcni","type":"portmap","capabilities":{"portMappings":true},
            "runtimeConfig":{"portMappings":[{"hostPort":8099,"containerPort":7,"protocol":"tcp"}]}}'
        bandwidth='{"cniVersion":"1.0.0","name":"wtcni","type":"bandwidth","ingressRate":80000000,"ingressBurst":8000000,
            "egressRate":80000000,"egressBurst":8000000}'"#;
    let call = match command {
        "ADD" => {
            r#"result=$(echo "$bridge" | $CNI_PATH/bridge)
            for plugin in portmap bandwidth; do
                eval "conf=\$$plugin"
                result=$(echo "$conf" | jq --argjson r "$result" '. + {prevResult: $r}' | $CNI_PATH/$plugin)
            done
            echo "$result" > /run/wtcni.result; echo "$result""#
        }
        _ => {
            r#"for plugin in bandwidth portmap bridge; do
                eval "conf=\$$plugin"
                echo "$conf" | jq --slurpfile r /run/wtcni.result '. + {prevResult: $r[0]}' | $CNI_PATH/$plugin
            done"#
        }
    };
    node(&format!(
        "export CNI_PATH=/usr/lib/cni CNI_IFNAME=eth0 CNI_CONTAINERID=wt CNI_COMMAND={command} CNI_NETNS={netns}\n{list}\n{call}"
    ))
}

#[test]
fn interfaces_come_and_go() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let run = Runtime::Walnut.run(DEBIAN).flag(TOOLS);
    let container = run
        .shell("socat TCP6-LISTEN:7,fork,reuseaddr,ipv6only=0 EXEC:cat & exec sleep 100000")
        .detach()?;
    let alone = container
        .shell("ip -o link | wc -l; ping -c 1 -w 30 ::1 > /dev/null && echo loopback")?
        .text();
    ensure!(alone == "1\nloopback", "{alone}");
    let netns = format!("/proc/{}/ns/net", container.vmm()?.pid);
    for round in 1..=2 {
        let result = cni("ADD", &netns)?;
        let address = node(&format!(
            "echo '{result}' | jq -r '.ips[0].address' | cut -d/ -f1"
        ))?;
        // By the address of the Pod, and by the published port of the node.
        echoed_by(&format!("{address}:7")).with_context(|| format!("round {round}"))?;
        echoed_by("10.90.0.1:8099")?;
        let routed = container
            .shell("ping -c 1 -w 30 10.90.0.1 > /dev/null && ip route show default")?
            .text();
        ensure!(routed.contains("via 10.90.0.1 dev eth0"), "{routed}");
        cni("DEL", &netns)?;
        let alone = || Ok((container.shell("ip -o link | wc -l")?.text() == "1").then_some(()));
        deadline::until(
            "the interface to go",
            Deadline::after(deadline::REQUEST),
            alone,
        )?;
    }
    node("ip link del wtbr; rm -rf /run/wtcni /run/wtcni.result")?;
    container.kill("SIGKILL")?;
    container.wait_for("STOPPED")?;
    container.task_status()?;
    container.remove()?;
    leak.nothing_left()
}

/// Interfaces that stand on others of the node; each on a wire of its own, whose far end is in a third namespace.
const UPON: &str = "
    ip netns add wtfar; ip netns add wtupon
    wire() {
        ip link add wt$1 type veth peer name far$1 netns wtfar; ip link set wt$1 up
        ip -n wtfar link set far$1 up; ip -n wtfar addr add 10.9$1.0.1/24 dev far$1
        ip -n wtfar addr add fd9$1::1/64 dev far$1 nodad
    }
    wire 1; ip link add link wt1 name eth0 netns wtupon type macvlan mode bridge
    wire 2; ip link add link wt2 name net1 netns wtupon type ipvlan mode l2
    wire 3; ip link add link wt3 name net2 netns wtupon type ipvlan mode l3
    n=1; for link in eth0 net1 net2; do
        ip -n wtupon link set $link up; ip -n wtupon addr add 10.9$n.0.2/24 dev $link
        ip -n wtupon addr add fd9$n::2/64 dev $link nodad; n=$((n + 1))
    done
    ip -n wtfar neigh add 10.93.0.2 lladdr $(cat /sys/class/net/wt3/address) dev far3";

/// Both ways, by neighbours that are looked for; the third has no neighbours but its router.
const REACHES: &str = "
    for far in 10.91.0.1 10.92.0.1 10.93.0.1 fd91::1 fd92::1; do
        ping -c 1 -w 30 $far > /dev/null && echo $far
    done
    ip -o link | sed -E 's/^[0-9]+: ([a-z0-9]+)@?[a-z0-9]*: <(NOARP)?.*/\\1 \\2/' | sort";

#[test]
fn interfaces_upon_others_are_as_runc_has_them() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let mut said = Vec::new();
    for runtime in [Runtime::Runc, Runtime::Walnut] {
        node(UPON)?;
        let told = (|| {
            let run = networked(runtime, DEBIAN, "--with-ns=network:/run/netns/wtupon");
            let container = run.flag(TOOLS).command(&["sleep", "100000"]).detach()?;
            said.push(container.shell(REACHES)?.text());
            node(
                "for near in 10.91.0.2 10.92.0.2 10.93.0.2 fd91::2; do
                ip netns exec wtfar ping -c 1 -w 30 $near > /dev/null; done",
            )
        })();
        let left = node(
            "ip -n wtupon -d link show dev eth0 | grep -o 'allmulti [0-9]'; tc -n wtupon qdisc | grep -c clsact || true",
        );
        node("ip netns del wtupon; ip netns del wtfar")?;
        told.with_context(|| format!("{runtime:?}"))?;
        ensure!(left? == "allmulti 0\n0", "the namespace is not as it was");
    }
    same_lines(&said)?;
    leak.nothing_left()
}

/// A file or link of the node that goes with its value.
struct Placed(&'static str);

impl Drop for Placed {
    fn drop(&mut self) {
        let _ = node(&format!("rm -rf {}", self.0));
    }
}

/// `ctr --cni`, as Docker, connects what was created and has not been started: the container's first look finds it.
#[test]
fn what_is_connected_before_the_start_is_there_at_it() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let _configuration = Placed("/etc/cni/net.d/00-wt.conflist");
    let _addresses = Placed("/run/wtcni");
    node(
        r#"mkdir -p /etc/cni/net.d /opt/cni; [ -e /opt/cni/bin ] || ln -s /usr/lib/cni /opt/cni/bin
        echo '{"cniVersion":"1.0.0","name":"wtctr","plugins":[{"type":"ptp","ipMasq":false,"ipam":{"type":"host-local",
            "dataDir":"/run/wtcni","subnet":"10.94.0.0/24","routes":[{"dst":"0.0.0.0/0"}]}}]}' > /etc/cni/net.d/00-wt.conflist"#,
    )?;
    let mut said = Vec::new();
    for runtime in [Runtime::Runc, Runtime::Walnut] {
        let run = networked(runtime, BUSYBOX, "--cni");
        // Nothing waits here: what isn't there at once is missing.
        let output = run.shell("ip -o -4 addr show eth0 | cut -d/ -f2 | cut -c1-2; ip route | sed 's/src 10.94.0.[0-9]*//'");
        said.push(output.finish()?.success()?.text());
    }
    same_lines(&said)?;
    ensure!(said[0].contains("default via 10.94.0.1"), "{said:?}");
    leak.nothing_left()
}

#[test]
fn the_hosts_network_is_refused() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    for flag in ["--net-host", "--with-ns=network:/proc/1/ns/net"] {
        let refused = networked(Runtime::Walnut, BUSYBOX, flag)
            .command(&["true"])
            .finish()?;
        ensure!(
            refused.stderr.contains("network") && refused.stderr.contains("host"),
            "{refused:?}"
        );
    }
    let nowhere = networked(
        Runtime::Walnut,
        BUSYBOX,
        "--with-ns=network:/run/netns/none",
    );
    let refused = nowhere.command(&["true"]).finish()?;
    ensure!(refused.stderr.contains("/run/netns/none"), "{refused:?}");
    leak.nothing_left()
}

/// Whoever ends the shim, the namespace is left as it was.
#[test]
fn a_dead_shim_leaves_no_filter_behind() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let wires = Wires::lay("wtdead")?;
    let before = wires.state()?;
    let run = networked(Runtime::Walnut, BUSYBOX, &wires.flag());
    let container = run.command(&["sleep", "100000"]).detach()?;
    ensure!(wires.state()?.contains("mirred"), "no filter");
    // Another Pod can't have what this one has.
    let second = networked(Runtime::Walnut, BUSYBOX, &wires.flag())
        .command(&["true"])
        .finish()?;
    ensure!(second.stderr.contains("redirected already"), "{second:?}");
    container.shim()?.kill(Signal::KILL)?;
    let left = || Ok((wires.state()? == before).then_some(()));
    deadline::until(
        "the namespace to be as it was",
        Deadline::after(deadline::REQUEST),
        left,
    )?;
    drop(container);
    drop(wires);
    leak.nothing_left()
}
